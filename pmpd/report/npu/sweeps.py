"""What the paper's figure does not say: its gain when one assumption at a time is changed. Knows no figure.

The base is the paper's case: CNN/DM's context (for the head none, as in the ceilings), INT8 KV cache, head and tables
left out, one sequence, planes apart. A gain is that of the pair's low bits for every decode step, the most that a
schedule can reach; fp16 and uniform high run under the same change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pmpd.hardware.npu import NPU, StoredWeights, decode_forward, generation_s, prefill_forward, published_shapes
from pmpd.records import FP16_BITS, Architecture
from pmpd.report.npu.validation import high_bits, models_of

CONTEXT_TOKENS, SHORT_CONTEXT_TOKENS = 1100, 100
"""CNN/DM's and DialogSum's, as its bars imply them."""

NEW_TOKENS = 120
PARENT_BITS = 8
SMALL_BUFFER_BYTES = 1 << 20

WHOLE = "everything on chip"

CONTEXTS = np.unique(np.geomspace(16, 32768, 45).round())
BATCHES = np.arange(1, 33)
PROMPTS = np.concatenate([np.array([16, 24, 32, 48, 64, 96]), 128 * np.arange(1, 33)])
"""Multiples of the array's 128 tokens beyond the first: between them padding hides the rest."""

COLUMNS = ("sweep", "hardware", "model", "variant", "weight_bits", "at", "quantity", "unit", "value")


@dataclass(frozen=True)
class Case:
    """A model on its machine, with the paper's pair."""

    npu: NPU
    model: str
    shape: Architecture
    high: int

    @property
    def low(self) -> int:
        return self.high - 1

    def gains(self, sweep: str, variant: str, at: Any = CONTEXT_TOKENS, **case: Any) -> Iterator[list[object]]:
        """Rows of the low bits' gain over fp16 and over uniform high, a row for each of ``at``."""
        machine = dataclasses.replace(self.npu, **case.pop("machine", {}))
        case = {"context_tokens": CONTEXT_TOKENS, "weights": StoredWeights(PARENT_BITS), **case}
        low, high, fp16 = (
            np.broadcast_to(decode_forward(machine, self.shape, bits, **case).total_s, np.shape(at))
            for bits in (self.low, self.high, FP16_BITS)
        )
        for quantity, unit, over in (
            ("decode_speedup", "times fp16", fp16),
            ("decode_gain_over_high", "times uniform high", high),
        ):
            for x, value in zip(np.atleast_1d(at), np.atleast_1d(over / low), strict=True):
                yield [sweep, self.npu.name, self.model, variant, self.low, float(x), quantity, unit, float(value)]


def cases(npus: Sequence[NPU]) -> list[Case]:
    """Every machine with the models that belong to it, head and tables left out as in the paper."""
    return [
        Case(dataclasses.replace(npu, count_head=False, count_tables=False), m, published_shapes()[m], high_bits(m))
        for npu in npus
        for m in models_of(npu.name)
    ]


def sweep(npus: Sequence[NPU]) -> pd.DataFrame:
    """All rows, ``at`` being the swept number: tokens of context or prompt, or sequences of the batch."""
    rows: list[list[object]] = []
    for case in cases(npus):
        for variant, machine in (
            ("as in the paper", {}),
            ("tables counted", {"count_tables": True}),
            ("head counted, 8 bits", {"count_head": True, "head_bits": 8}),
            ("head counted, 16 bits", {"count_head": True, "head_bits": 16}),
        ):
            rows += case.gains("head", variant, 0, machine=machine, context_tokens=0)
        for kv_bits in (4, 8, 16):
            rows += case.gains("kv_cache", f"{kv_bits} bits", machine={"kv_bits": kv_bits})
        for kv_bits in (8, 16):
            machine = {"kv_bits": kv_bits}
            rows += case.gains("context", f"KV {kv_bits} bits", CONTEXTS, machine=machine, context_tokens=CONTEXTS)
        for context in (SHORT_CONTEXT_TOKENS, CONTEXT_TOKENS):
            rows += case.gains("batch", f"{context} tokens of context", BATCHES, batch=BATCHES, context_tokens=context)
        for variant, nested, parent in (
            ("only the step's planes", True, PARENT_BITS),
            ("all planes of a parent at high bits", False, case.high),
            ("all planes of a parent at 8 bits", False, PARENT_BITS),
        ):
            machine, weights = {"nested_layout": nested}, StoredWeights(parent)
            rows += case.gains("layout", variant, machine=machine, weights=weights)
        rows += _prefill_rows(case)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _prefill_rows(case: Case) -> Iterator[list[object]]:
    small: dict[str, Any] = {
        "activation_buffer_bytes": SMALL_BUFFER_BYTES,
        "weight_buffer_bytes": SMALL_BUFFER_BYTES,
    }
    for buffers, machine in ((WHOLE, case.npu), ("1 MiB buffers", dataclasses.replace(case.npu, **small))):
        low_s, steps_s = generation_s(machine, case.shape, PROMPTS, case.low, [case.low] * NEW_TOKENS)
        decode_s = steps_s.sum(axis=-1)
        for bits in (case.high, 8, FP16_BITS) if buffers == WHOLE else (case.high, FP16_BITS):
            raised_s = prefill_forward(machine, case.shape, bits, PROMPTS).total_s
            overhead = 100.0 * (raised_s - low_s) / (low_s + decode_s)
            for prompt, value in zip(PROMPTS, overhead, strict=True):
                yield [
                    *("prefill", case.npu.name, case.model, buffers, bits, float(prompt)),
                    *("prefill_overhead", "% of end-to-end time", float(value)),
                ]


def machine_gain(case: Case, macs: np.ndarray, bandwidth_bytes_s: np.ndarray) -> np.ndarray:
    """Gain over fp16 ``[macs, bandwidth]`` of the low bits at CNN/DM's context on every such machine, in one call."""
    many = dataclasses.replace(case.npu, num_macs=macs[:, None], bandwidth_bytes_s=bandwidth_bytes_s[None, :])
    fp16, low = (decode_forward(many, case.shape, bits, CONTEXT_TOKENS).total_s for bits in (FP16_BITS, case.low))
    return fp16 / low
