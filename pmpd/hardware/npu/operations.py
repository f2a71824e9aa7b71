"""Seconds of single operations: a linear layer, the two products of attention.

An operation has arithmetic and memory traffic that overlap (double buffering), so the longer one counts:

    seconds = max(max(products, streamed vector work) + blocking vector work, bytes / bandwidth)

Activation functions and residuals stream with the product that they follow. A norm or softmax needs a whole row before
the next product starts, so the array waits for it, while the memory goes on to fetch that product's weights. All
arguments broadcast. Knows an NPU and sizes, not a model's order of layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pmpd.hardware.npu.machine import BUFFER_HALVES, NPU, Number
from pmpd.records import FP16_BITS

NORM_PASSES = 2
"""Over its elements: statistics, then scaling. Also of a softmax (FlightLLM's special function unit)."""
SOFTMAX_PASSES = 2

Array = NDArray[np.float64]


def linear_s(
    npu: NPU,
    tokens: Number,
    outputs: int,
    inputs: int,
    weight_bytes: Number,
    normed_elements: Number = 0.0,
) -> Array:
    """A matrix of ``outputs`` x ``inputs`` applied to ``tokens`` rows, after norms over ``normed_elements``.

    Raises:
        ValueError: an activation buffer that holds no row of the inputs.
    """
    products_s = product_s(npu, tokens, outputs, inputs)
    arithmetic_s = np.maximum(products_s, vector_s(npu, tokens * outputs)) + vector_s(
        npu, NORM_PASSES * normed_elements
    )
    traffic = linear_bytes(npu, tokens, outputs, inputs, weight_bytes)
    return np.maximum(
        arithmetic_s, traffic / (npu.bandwidth_bytes_s * npu.bandwidth_efficiency * npu.region_efficiency)
    )


def attention_s(
    npu: NPU, new_tokens: Number, context_tokens: Number, num_heads: int, num_kv_heads: int, head_dim: int
) -> Array:
    """One block's attention for one sequence: queries times keys, softmax, weights times values.

    ``new_tokens`` queries see ``context_tokens`` positions, their own included, causally. Query heads that share a
    key-value head are rows of one product. The cache is read, and the new positions written, once for each part of
    the queries that the activation buffer holds (an upper bound where parts see less than all).

    Raises:
        ValueError: as :func:`linear_s`.
    """
    group = num_heads // num_kv_heads
    pairs = new_tokens * (context_tokens - new_tokens) + new_tokens * (new_tokens + 1.0) / 2.0
    causal = pairs / np.maximum(new_tokens * context_tokens, 1.0)
    rows = new_tokens * group
    scores_s = num_kv_heads * causal * product_s(npu, rows, context_tokens, head_dim)
    values_s = num_kv_heads * causal * product_s(npu, rows, head_dim, context_tokens)
    softmax_s = vector_s(npu, SOFTMAX_PASSES * num_heads * pairs)
    parts: Number = 1.0
    if npu.activation_buffer_bytes is not None:
        parts = np.ceil(new_tokens / _rows_on_chip(npu, num_heads * head_dim))
    half_bytes = parts * context_tokens * num_kv_heads * head_dim * npu.kv_bits / 8.0  # keys; values are as many
    efficiency = npu.bandwidth_efficiency if npu.kv_bandwidth_efficiency is None else npu.kv_bandwidth_efficiency
    memory_s = half_bytes / (npu.bandwidth_bytes_s * efficiency * npu.region_efficiency)
    return np.maximum(scores_s, memory_s) + np.maximum(softmax_s + values_s, memory_s)


def product_s(npu: NPU, rows: Number, outputs: Number, inputs: Number) -> Array:
    """Seconds of ``rows`` x ``outputs`` x ``inputs`` multiply-accumulates in the faster of the array's two modes.

    Matrix mode: every dimension padded to its tile, and for each pair of output and input tile ``matrix_fill_cycles``
    beside the cycles in which the rows stream through. Matrix-vector mode: row after row.
    """
    streamed = np.ceil(rows / npu.matrix_tile_tokens)
    matrix = (
        _padded(outputs, npu.matrix_tile_outputs)
        * _padded(inputs, npu.matrix_tile_inputs)
        * (streamed + npu.matrix_fill_cycles)
        * npu.matrix_tile_tokens
        / npu.matrix_utilisation
    )
    vector = (
        rows
        * _padded(outputs, npu.matrix_vector_tile_outputs)
        * _padded(inputs, npu.matrix_vector_tile_inputs)
        / npu.matrix_vector_utilisation
    )
    return np.minimum(matrix, vector) / (npu.num_macs * npu.clock_hz * npu.region_efficiency)


def vector_s(npu: NPU, elements: Number) -> Array:
    """Seconds of one pass over ``elements`` on the vector unit."""
    if npu.vector_lanes is None:
        return np.zeros(())
    return np.asarray(elements / (npu.vector_lanes * npu.clock_hz * npu.region_efficiency))


def linear_bytes(npu: NPU, rows: Number, outputs: int, inputs: int, weight_bytes: Number) -> Array:
    """Memory traffic of a linear layer.

    Weights once, if inputs and outputs fit the activation buffer; then nothing else. If not, the smaller of: rows
    kept in parts, the weights read again for each; weights kept in parts, the inputs read again for each.

    Raises:
        ValueError: as :func:`linear_s`.
    """
    if npu.activation_buffer_bytes is None:
        return np.asarray(weight_bytes, dtype=np.float64)
    row_bytes = npu.activation_bits / 8.0
    through = rows * (inputs + outputs) * row_bytes
    keep_rows = weight_bytes * np.ceil(rows / _rows_on_chip(npu, inputs)) + through
    parts: Number = 1.0
    if npu.weight_buffer_bytes is not None:
        parts = np.ceil(weight_bytes / (npu.weight_buffer_bytes / BUFFER_HALVES))
    keep_weights = weight_bytes + (inputs * parts + outputs) * rows * row_bytes
    fits = through <= npu.activation_buffer_bytes / BUFFER_HALVES
    return np.where(fits, weight_bytes, np.minimum(keep_rows, keep_weights))


def stored_bytes(npu: NPU, outputs: int, inputs: int, bits: Array, planes: Array, group_size: int | None) -> Array:
    """Bytes of one matrix in a forward at ``bits`` that reads ``planes`` bit planes, tables included if counted.

    A fraction of a bit is a share of steps one bit higher, so its table is the mixture of the two.
    """
    total = outputs * inputs * planes / 8.0
    if npu.count_tables:
        floor = np.floor(bits)
        centroids = 2.0**floor * (1.0 + bits - floor)
        tables = outputs * (1 if group_size is None else -(-inputs // group_size))
        entries = tables * (centroids * npu.table_entry_bits + npu.scale_bits) / 8.0
        total = total + np.where(bits == FP16_BITS, 0.0, entries)
    return total


def _padded(size: Number, tile: Number) -> Number:
    return np.ceil(size / tile) * tile


def _rows_on_chip(npu: NPU, width: int) -> Array:
    assert npu.activation_buffer_bytes is not None
    row_bytes = width * npu.activation_bits / 8.0
    rows = np.floor(npu.activation_buffer_bytes / BUFFER_HALVES / row_bytes)
    if not np.all(rows >= 1):
        raise ValueError(
            f"activation_buffer_bytes={npu.activation_buffer_bytes}: at least {BUFFER_HALVES * np.max(row_bytes):g}, "
            f"two rows of {width} inputs at {npu.activation_bits} bits"
        )
    return rows
