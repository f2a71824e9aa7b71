"""Seconds of a model's forwards on an NPU: prefill, a decode step, a schedule step by step with its growing context.

A forward is the sum of its operations over a block, times blocks, and the output head if it is counted. Embedding
look-ups (a row a token), rotary tables and instruction fetches are left out. Knows shapes and bits, never a model
or a config.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pmpd.hardware.npu.machine import NPU, StoredWeights
from pmpd.hardware.npu.operations import Array, attention_s, linear_s, stored_bytes
from pmpd.records import FP16_BITS, Architecture

NORMS_A_BLOCK = 2
"""Before attention and before the MLP. Phi has one; the second is then charged in excess."""

ANY_WEIGHTS = StoredWeights()


@dataclass(frozen=True)
class Forward:
    """Seconds of one forward over all blocks, by kind of operation; arrays that broadcast with each other."""

    linears_s: Array
    attention_s: Array
    head_s: Array

    @property
    def total_s(self) -> Array:
        return self.linears_s + self.attention_s + self.head_s


def decode_forward(
    npu: NPU,
    architecture: Architecture,
    bits: ArrayLike,
    context_tokens: ArrayLike,
    weights: StoredWeights = ANY_WEIGHTS,
    batch: ArrayLike = 1,
) -> Forward:
    """One decode step of ``batch`` sequences of equal length, which share the weights that it reads.

    ``context_tokens`` are the positions attended to, the step's own included (its key and value are written instead
    of read: the same bytes). At 0 there is no KV cache: a bound for any context. ``bits`` may be a fraction, an
    average. 16 is the unquantised model.

    Raises:
        ValueError: bits outside (0, 16] or above the parent's but not 16; a negative context, a batch below 1; no
            ``parent_bits`` for a layout that is not nested; heads that the key-value heads do not divide; a buffer
            too small for the model.
    """
    context = _at_least("context_tokens", context_tokens, 0)
    return _forward(npu, architecture, bits, np.ones(()), context, weights, _at_least("batch", batch, 1))


def prefill_forward(
    npu: NPU,
    architecture: Architecture,
    bits: ArrayLike,
    prompt_tokens: ArrayLike,
    weights: StoredWeights = ANY_WEIGHTS,
    batch: ArrayLike = 1,
) -> Forward:
    """Prefill of ``batch`` prompts of equal length in one forward, causal; the head at the last position only.

    Raises:
        ValueError: as :func:`decode_forward`.
    """
    prompt = _at_least("prompt_tokens", prompt_tokens, 1)
    return _forward(npu, architecture, bits, prompt, prompt, weights, _at_least("batch", batch, 1))


def decode_steps_s(
    npu: NPU,
    architecture: Architecture,
    prompt_tokens: ArrayLike,
    decode_bits: Sequence[float],
    weights: StoredWeights = ANY_WEIGHTS,
    batch: ArrayLike = 1,
) -> Array:
    """Seconds of every decode step ``[..., steps]``; step t attends to ``prompt_tokens + t`` positions.

    ``prompt_tokens`` ``[...]`` gets an axis for the steps; arrays of the NPU and a batch must bring one of length 1.

    Raises:
        ValueError: as :func:`decode_forward`.
    """
    if not len(decode_bits):
        return np.zeros(0)
    # Weights do not depend on the context and few precisions occur, so their part is worked out once for each.
    bits, step = np.unique(np.asarray(decode_bits, dtype=np.float64), return_inverse=True)
    rest = decode_forward(npu, architecture, bits, 0, weights, batch)
    context = _at_least("prompt_tokens", prompt_tokens, 0)[..., None] + np.arange(1, len(step) + 1)
    attention = decode_forward(npu, architecture, FP16_BITS, context, weights, batch).attention_s
    return rest.total_s[..., step] + attention


def generation_s(
    npu: NPU,
    architecture: Architecture,
    prompt_tokens: ArrayLike,
    prefill_bits: int,
    decode_bits: Sequence[int],
    weights: StoredWeights = ANY_WEIGHTS,
    batch: ArrayLike = 1,
) -> tuple[Array, Array]:
    """Seconds of prefill, and of every decode step; ``decode_bits[t - 1]`` is decode step t.

    A sequence of one token has no decode step.

    Raises:
        ValueError: as :func:`decode_forward`.
    """
    first = prefill_forward(npu, architecture, prefill_bits, prompt_tokens, weights, batch).total_s
    return first, decode_steps_s(npu, architecture, prompt_tokens, decode_bits, weights, batch)


def tokens_per_s(
    npu: NPU,
    architecture: Architecture,
    prompt_tokens: ArrayLike,
    decode_bits: Sequence[int],
    weights: StoredWeights = ANY_WEIGHTS,
    batch: ArrayLike = 1,
) -> Array:
    """Decode throughput, the paper's number: the steps of all sequences over their time, prefill left out.

    Raises:
        ValueError: no decode step, or as :func:`decode_forward`.
    """
    if not len(decode_bits):
        raise ValueError("decode_bits is empty: a sequence of one token has no decode throughput")
    seconds = decode_steps_s(npu, architecture, prompt_tokens, decode_bits, weights, batch).sum(axis=-1)
    return len(decode_bits) * np.asarray(batch, dtype=np.float64) / seconds


def _forward(
    npu: NPU,
    architecture: Architecture,
    bits: ArrayLike,
    new_tokens: Array,
    context: Array,
    weights: StoredWeights,
    batch: Array,
) -> Forward:
    a = architecture
    if a.num_heads % a.num_kv_heads:
        raise ValueError(f"num_kv_heads={a.num_kv_heads}: must divide num_heads ({a.num_heads})")
    read, planes = _bits_and_planes(npu, bits, weights)
    tokens = new_tokens * batch
    first = a.linear_shapes[0]
    linears = np.zeros(())
    for (outputs, inputs), count in Counter(a.linear_shapes).items():
        stored = stored_bytes(npu, outputs, inputs, read, planes, weights.group_size)
        if (outputs, inputs) == first:  # both norms are charged where the block's first product waits
            normed = NORMS_A_BLOCK * a.hidden_size * tokens
            linears = linears + linear_s(npu, tokens, outputs, inputs, stored, normed)
            count -= 1
        if count:
            linears = linears + count * linear_s(npu, tokens, outputs, inputs, stored)
    attention = batch * attention_s(npu, new_tokens, context, a.num_heads, a.num_kv_heads, a.head_dim)
    head = np.zeros(())
    if npu.count_head:
        head_bits = np.asarray(npu.head_bits, dtype=np.float64)
        stored = stored_bytes(npu, a.vocab_size, a.hidden_size, head_bits, head_bits, weights.group_size)
        head = linear_s(npu, batch, a.vocab_size, a.hidden_size, stored, a.hidden_size * batch)
    return Forward(a.num_layers * linears, a.num_layers * attention, head)


def _bits_and_planes(npu: NPU, bits: ArrayLike, weights: StoredWeights) -> tuple[Array, Array]:
    """Bits as an array, checked, and the bit planes that a forward at them reads."""
    read = np.asarray(bits, dtype=np.float64)
    if not ((read > 0) & (read <= FP16_BITS)).all():
        raise ValueError(f"bits={bits!r}: above 0, at most {FP16_BITS}")
    parent = weights.parent_bits
    if parent is not None and ((read > parent) & (read != FP16_BITS)).any():
        raise ValueError(f"bits={bits!r}: at most parent_bits ({parent}), or {FP16_BITS}")
    if npu.nested_layout:
        return read, read
    if parent is None:
        raise ValueError("parent_bits=None: a layout that is not nested reads all of the parent's bits")
    return read, np.where(read == FP16_BITS, read, float(parent))


def _at_least(name: str, value: ArrayLike, least: int) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not (array >= least).all():
        raise ValueError(f"{name}={value!r}: at least {least}")
    return array
