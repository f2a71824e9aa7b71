"""What the model says of every published case, and its ceilings: the rows of ``results.csv``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd

from pmpd.hardware.npu import (
    NPU,
    decode_forward,
    generation_s,
    prefill_forward,
    published_shapes,
    tokens_per_s,
)
from pmpd.records import FP16_BITS, Architecture
from pmpd.report.npu.published import Published, read_published

COLUMNS = (
    "hardware",
    "model",
    "task",
    "schedule",
    "weight_bits",
    "context_tokens",
    "head",
    "quantity",
    "unit",
    "value",
    "published",
    "confidence",
)

CEILING_BITS = (16, 8, 4, 3, 2)

LOW_BITS = 2
"""Of the prefill that a higher one is compared with, and of the decoding after it (the paper's ablation)."""


def models_of(hardware: str) -> list[str]:
    """The models that were published for a machine; all that we have shapes of for any other."""
    named = list(dict.fromkeys(p.model for p in read_published() if p.hardware == hardware))
    return named or list(published_shapes())


def high_bits(model: str) -> int:
    """Uniform high of the model in the paper's figure, 4 for a model that it does not show; low is one less."""
    found = [p.weight_bits for p in read_published() if (p.model, p.schedule) == (model, "high")]
    return int(found[0]) if found else 4


def compare(npus: Sequence[NPU]) -> pd.DataFrame:
    """The published cases of these machines with the model's value beside them."""
    machines = {npu.name: npu for npu in npus}
    rows = [_row(p, estimate(machines[p.hardware], p)) for p in read_published() if p.hardware in machines]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ceilings(npus: Sequence[NPU]) -> pd.DataFrame:
    """Throughput at no context, hence no KV cache, without tables; and what the output head leaves of the gain."""
    rows = []
    for npu in npus:
        for model in models_of(npu.name):
            for counted in (False, True):
                bare = dataclasses.replace(npu, count_head=counted, count_tables=False)
                times = decode_forward(bare, published_shapes()[model], CEILING_BITS, 0).total_s
                for bits, seconds in zip(CEILING_BITS, times, strict=True):
                    case = [npu.name, model, "any", "uniform", bits, 0, "counted" if counted else "excluded"]
                    rows.append([*case, "decode_throughput", "tokens/s", 1.0 / seconds, None, "formula"])
                    rows.append([*case, "decode_speedup", "times fp16", times[0] / seconds, None, "formula"])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def estimate(npu: NPU, p: Published) -> float:
    """The model's value of a published quantity, in its unit, at the case's bits, context and head."""
    machine = dataclasses.replace(npu, count_head=p.head == "counted")
    shape = published_shapes()[p.model]
    match p.quantity:
        case "decode_throughput" | "decode_throughput_by_label" if p.prompt_tokens is None:
            return 1.0 / _step_s(machine, shape, p, p.weight_bits)
        case "decode_throughput":
            assert p.prompt_tokens is not None
            assert p.new_tokens is not None
            return float(tokens_per_s(machine, shape, p.prompt_tokens, [int(p.weight_bits)] * p.new_tokens))
        case "decode_speedup":
            return _step_s(machine, shape, p, FP16_BITS) / _step_s(machine, shape, p, p.weight_bits)
        case "decode_gain_over_high":
            return _step_s(machine, shape, p, high_bits(p.model)) / _step_s(machine, shape, p, p.weight_bits)
        case "decode_latency":
            return 1e3 * _step_s(machine, shape, p, p.weight_bits)
        case "prefill_latency":
            assert p.prompt_tokens is not None
            return 1e3 * float(prefill_forward(machine, shape, p.weight_bits, p.prompt_tokens).total_s)
        case "prefill_overhead":
            return _prefill_overhead(machine, shape, p)
    raise AssertionError(f"no estimate for {p.quantity}")


def _step_s(npu: NPU, shape: Architecture, p: Published, bits: float) -> float:
    assert p.context_tokens is not None
    return float(decode_forward(npu, shape, bits, p.context_tokens).total_s)


def _prefill_overhead(npu: NPU, shape: Architecture, p: Published) -> float:
    assert p.prompt_tokens is not None
    assert p.new_tokens is not None
    low_s, steps_s = generation_s(npu, shape, p.prompt_tokens, LOW_BITS, [LOW_BITS] * p.new_tokens)
    raised_s = prefill_forward(npu, shape, p.weight_bits, p.prompt_tokens).total_s
    return 100.0 * float((raised_s - low_s) / (low_s + steps_s.sum()))


def _row(p: Published, value: float) -> list[object]:
    context = p.prompt_tokens if p.context_tokens is None else p.context_tokens
    case = [p.hardware, p.model, p.task, p.schedule, p.weight_bits, context, p.head]
    return [*case, p.quantity, p.unit, value, p.value, p.confidence]
