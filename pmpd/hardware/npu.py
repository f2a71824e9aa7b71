"""The bandwidth and compute estimate behind the paper's NPU figure.

Time of a forward is the longer of its multiplications and its memory traffic; traffic is the weights of the
decoder blocks at the precision of the step, the INT8 KV cache and, if counted, the output head. That alone
reproduces the paper's bars within 4 % (facts collected from figure 5 of arXiv 2410.13461; the formula is
inferred from its printed values, the paper does not state it). Activations, tiles, look-up tables and
non-linear operations are left out. Knows shapes and bits, never a model or a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmpd.records import FP16_BITS, Architecture


@dataclass(frozen=True)
class NPU:
    """A neural processing unit.

    Attributes:
        num_macs: multiply-accumulate units (paper: 4096 for the small models, 16384 for Vicuna-7B).
        clock_hz: 1e9 in the paper.
        bandwidth_bytes_s: of external memory, 32e9 in the paper.
        bandwidth_efficiency: share of it that weights and KV cache reach, (0, 1].
        mac_utilisation_prefill: share of the units busy in matrix-matrix products, (0, 1].
        mac_utilisation_decode: the same in matrix-vector products (FlightLLM, arXiv 2401.03868: at most 0.25).
        kv_bits: of one cached key or value element.
        count_head: charge the output head, which the paper's figure leaves out.
        head_bits: its weights' precision, whatever the blocks' is.
        nested_layout: bit planes lie apart, so b bits read b planes; if not, every step reads all of the parent.

    Raises:
        ValueError: a number outside its range.
    """

    name: str
    num_macs: int
    clock_hz: float
    bandwidth_bytes_s: float
    bandwidth_efficiency: float = 1.0
    mac_utilisation_prefill: float = 1.0
    mac_utilisation_decode: float = 1.0
    kv_bits: int = 8
    count_head: bool = False
    head_bits: int = FP16_BITS
    nested_layout: bool = True

    def __post_init__(self) -> None:
        for name in ("num_macs", "clock_hz", "bandwidth_bytes_s", "kv_bits", "head_bits"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: more than 0")
        for name in ("bandwidth_efficiency", "mac_utilisation_prefill", "mac_utilisation_decode"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: above 0, at most 1")


def decode_step_s(
    npu: NPU, architecture: Architecture, bits: ArrayLike, context_tokens: ArrayLike, parent_bits: int | None = None
) -> NDArray[np.float64]:
    """Seconds of one decode step for one sequence; ``bits`` and ``context_tokens`` broadcast.

    ``context_tokens`` are the positions attended to, the step's own included (its key and value are written
    instead of read: the same bytes). ``bits`` may be a fraction, an average. 16 is the unquantised fp16 model.

    Raises:
        ValueError: bits outside (0, 16] or above ``parent_bits`` but not 16, a negative context, or no
            ``parent_bits`` for a layout that is not nested.
    """
    context = _tokens("context_tokens", context_tokens)
    traffic_bytes = _weight_bytes(npu, architecture, bits, parent_bits) + _kv_bytes(npu, architecture, context)
    macs = _block_macs(architecture) + 2.0 * architecture.num_layers * _query_width(architecture) * context
    if npu.count_head:
        traffic_bytes = traffic_bytes + _head_bytes(npu, architecture)
        macs = macs + _head_macs(architecture)
    return _longer_s(npu, macs, traffic_bytes, npu.mac_utilisation_decode)


def prefill_s(
    npu: NPU, architecture: Architecture, bits: ArrayLike, prompt_tokens: ArrayLike, parent_bits: int | None = None
) -> NDArray[np.float64]:
    """Seconds of one prompt's prefill: weights read once, causal attention, the head at the last position only.

    Raises:
        ValueError: as :func:`decode_step_s`.
    """
    prompt = _tokens("prompt_tokens", prompt_tokens)
    traffic_bytes = _weight_bytes(npu, architecture, bits, parent_bits) + _kv_bytes(npu, architecture, prompt)
    # Causal: T (T + 1) / 2 pairs, each one product with a key and one with a value.
    attention = architecture.num_layers * _query_width(architecture) * prompt * (prompt + 1.0)
    macs = _block_macs(architecture) * prompt + attention
    if npu.count_head:
        traffic_bytes = traffic_bytes + _head_bytes(npu, architecture)
        macs = macs + _head_macs(architecture)
    return _longer_s(npu, macs, traffic_bytes, npu.mac_utilisation_prefill)


def generation_time_s(
    npu: NPU,
    architecture: Architecture,
    prompt_tokens: int,
    prefill_bits: int,
    decode_bits: Sequence[int],
    parent_bits: int | None = None,
) -> tuple[float, float]:
    """Seconds of prefill, and of all decode steps together; ``decode_bits[t - 1]`` is decode step t.

    Step t attends to ``prompt_tokens + t`` positions. A sequence of one token has no decode step: 0 seconds.

    Raises:
        ValueError: as :func:`decode_step_s`.
    """
    first = float(prefill_s(npu, architecture, prefill_bits, prompt_tokens, parent_bits))
    if not len(decode_bits):
        return first, 0.0
    context = prompt_tokens + np.arange(1, len(decode_bits) + 1)
    return first, float(decode_step_s(npu, architecture, np.asarray(decode_bits), context, parent_bits).sum())


def tokens_per_s(
    npu: NPU, architecture: Architecture, prompt_tokens: int, decode_bits: Sequence[int], parent_bits: int | None = None
) -> float:
    """Decode throughput of one sequence, the paper's number: decode steps over their time, prefill left out.

    Raises:
        ValueError: no decode step, or as :func:`decode_step_s`.
    """
    if not len(decode_bits):
        raise ValueError("decode_bits is empty: a sequence of one token has no decode throughput")
    _, decode_s = generation_time_s(npu, architecture, prompt_tokens, FP16_BITS, decode_bits, parent_bits)
    return len(decode_bits) / decode_s


def _longer_s(npu: NPU, macs: Any, traffic_bytes: Any, utilisation: float) -> NDArray[np.float64]:
    """Compute and memory overlap fully (double buffering), so the longer one counts."""
    compute_s = macs / (npu.num_macs * npu.clock_hz * utilisation)
    memory_s = traffic_bytes / (npu.bandwidth_bytes_s * npu.bandwidth_efficiency)
    return np.maximum(compute_s, memory_s)


def _weight_bytes(
    npu: NPU, architecture: Architecture, bits: ArrayLike, parent_bits: int | None
) -> NDArray[np.float64]:
    read = np.asarray(bits, dtype=np.float64)
    if not ((read > 0) & (read <= FP16_BITS)).all():
        raise ValueError(f"bits={bits!r}: above 0, at most {FP16_BITS}")
    if parent_bits is not None and ((read > parent_bits) & (read != FP16_BITS)).any():
        raise ValueError(f"bits={bits!r}: at most parent_bits ({parent_bits}), or {FP16_BITS}")
    if not npu.nested_layout:
        if parent_bits is None:
            raise ValueError("parent_bits=None: a layout that is not nested reads all of the parent's bits")
        read = np.where(read == FP16_BITS, read, float(parent_bits))
    return architecture.num_layers * architecture.block_parameters * read / 8.0


def _kv_bytes(npu: NPU, architecture: Architecture, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    width = architecture.num_kv_heads * architecture.head_dim
    return 2.0 * architecture.num_layers * width * tokens * npu.kv_bits / 8.0


def _head_bytes(npu: NPU, architecture: Architecture) -> float:
    return _head_macs(architecture) * npu.head_bits / 8.0


def _head_macs(architecture: Architecture) -> float:
    return float(architecture.vocab_size * architecture.hidden_size)


def _block_macs(architecture: Architecture) -> float:
    """Per token."""
    return float(architecture.num_layers * architecture.block_parameters)


def _query_width(architecture: Architecture) -> int:
    return architecture.num_heads * architecture.head_dim


def _tokens(name: str, tokens: ArrayLike) -> NDArray[np.float64]:
    count = np.asarray(tokens, dtype=np.float64)
    if not (count >= 0).all():
        raise ValueError(f"{name}={tokens!r}: at least 0")
    return count
