"""The NPU model once more, one number at a time, and small machines to reason about by hand."""

from __future__ import annotations

from math import ceil

from pmpd.hardware.npu import NPU
from pmpd.records import Architecture

TINY = Architecture(2, 8, 4, 2, 2, ((8, 8), (4, 8)), 10)
UNIT = NPU("unit", num_macs=10, clock_hz=1.0, bandwidth_bytes_s=100.0)
LARGE = NPU("16K", num_macs=16384, clock_hz=1e9, bandwidth_bytes_s=32e9)
SMALL = NPU("4K", num_macs=4096, clock_hz=1e9, bandwidth_bytes_s=32e9)


def plain_product_s(npu: NPU, rows: float, outputs: float, inputs: float) -> float:
    def padded(size: float, tile: float) -> float:
        return ceil(size / tile) * tile

    tile = npu.matrix_tile_tokens * npu.matrix_tile_outputs * npu.matrix_tile_inputs
    passes = ceil(outputs / npu.matrix_tile_outputs) * ceil(inputs / npu.matrix_tile_inputs)
    matrix = passes * (ceil(rows / npu.matrix_tile_tokens) + npu.matrix_fill_cycles) * tile / npu.matrix_utilisation
    vector = rows * padded(outputs, npu.matrix_vector_tile_outputs) * padded(inputs, npu.matrix_vector_tile_inputs)
    return min(matrix, vector / npu.matrix_vector_utilisation) / (npu.num_macs * npu.clock_hz * npu.region_efficiency)


def plain_forward_s(
    npu: NPU,
    shape: Architecture,
    bits: float,
    new: int,
    context: int,
    batch: int = 1,
    parent: int | None = None,
    group: int | None = None,
) -> float:
    """One forward as a loop over layers and operations, in Python numbers."""
    lanes = float("inf") if npu.vector_lanes is None else npu.vector_lanes * npu.clock_hz * npu.region_efficiency
    weight_rate = npu.bandwidth_bytes_s * npu.bandwidth_efficiency * npu.region_efficiency
    kv_efficiency = npu.kv_bandwidth_efficiency or npu.bandwidth_efficiency
    kv_rate = npu.bandwidth_bytes_s * kv_efficiency * npu.region_efficiency

    def stored(outputs: int, inputs: int, b: float, planes: float) -> float:
        table = 0.0
        if npu.count_tables and b != 16:
            tables = outputs * (ceil(inputs / group) if group else 1)
            below = int(b)
            entries = 2**below * (below + 1 - b) + 2 ** (below + 1) * (b - below)
            table = tables * (entries * npu.table_entry_bits + npu.scale_bits) / 8
        return outputs * inputs * planes / 8 + table

    def traffic(rows: int, outputs: int, inputs: int, weights: float) -> float:
        if npu.activation_buffer_bytes is None:
            return weights
        half, a = npu.activation_buffer_bytes / 2, npu.activation_bits / 8
        if rows * (inputs + outputs) * a <= half:
            return weights
        rows_a_part = int(half / (inputs * a))
        parts = ceil(weights / (npu.weight_buffer_bytes / 2)) if npu.weight_buffer_bytes else 1
        keep_rows = weights * ceil(rows / rows_a_part) + rows * (inputs + outputs) * a
        keep_weights = weights + rows * (inputs * parts + outputs) * a
        return min(keep_rows, keep_weights)

    def linear(rows: int, outputs: int, inputs: int, weights: float, normed: float) -> float:
        arithmetic = max(plain_product_s(npu, rows, outputs, inputs), rows * outputs / lanes) + 2 * normed / lanes
        return max(arithmetic, traffic(rows, outputs, inputs, weights) / weight_rate)

    planes = bits if npu.nested_layout or bits == 16 else parent
    total = 0.0
    for _ in range(shape.num_layers):
        for i, (outputs, inputs) in enumerate(shape.linear_shapes):
            normed = 2 * shape.hidden_size * new * batch if i == 0 else 0
            total += linear(new * batch, outputs, inputs, stored(outputs, inputs, bits, planes), normed)
        pairs = sum(context - new + i + 1 for i in range(new))
        causal = pairs / max(new * context, 1)
        shared = shape.num_heads // shape.num_kv_heads
        parts = 1
        if npu.activation_buffer_bytes is not None:
            width = shape.num_heads * shape.head_dim * npu.activation_bits / 8
            parts = ceil(new / int(npu.activation_buffer_bytes / 2 / width))
        memory = parts * context * shape.num_kv_heads * shape.head_dim * npu.kv_bits / 8 / kv_rate
        scores = shape.num_kv_heads * causal * plain_product_s(npu, new * shared, context, shape.head_dim)
        values = shape.num_kv_heads * causal * plain_product_s(npu, new * shared, shape.head_dim, context)
        softmax = 2 * shape.num_heads * pairs / lanes
        total += batch * (max(scores, memory) + max(softmax + values, memory))
    if npu.count_head:
        weights = stored(shape.vocab_size, shape.hidden_size, npu.head_bits, npu.head_bits)
        total += linear(batch, shape.vocab_size, shape.hidden_size, weights, shape.hidden_size * batch)
    return total
