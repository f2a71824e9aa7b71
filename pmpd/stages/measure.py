"""What a schedule gains: the time of every decode step that an evaluation's completions took, against uniform ones.

On an NPU a step's time is a model's (``pmpd.hardware.npu``), on a GPU what ``latency`` measured there. Either way the
schedules, prompt lengths and numbers of tokens are those of the evaluation, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmpd.artifacts import read_json, write_json
from pmpd.hardware.npu import NPU, StoredWeights, decode_steps_s, prefill_forward
from pmpd.models import architecture
from pmpd.records import FP16_BITS, Completion, Generation
from pmpd.stages.base import Stage, write_summary
from pmpd.stages.bits import outlier_bits, step_bits
from pmpd.stages.evaluate import RESULTS_FILE, read_completions
from pmpd.stages.scoring import mean_scores, result

Seconds = NDArray[np.float64]
StepsS = Callable[[int, list[int]], Seconds]
"""Seconds of each decode step, from the prompt's tokens and the steps' bits."""


@dataclass(frozen=True)
class EstimateConfig:
    """The NPU's constants (``conf/hardware``), the planes of the model that was decoded and the inputs that share a
    table."""

    npu: dict[str, Any]
    parent_bits: int
    group_size: int | None
    trust_remote_code: bool
    resamples: int
    seed: int


def run_estimate(config: EstimateConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Throughput and paired speed-up on an NPU for the completions of an evaluation."""
    npu = NPU(**config.npu)
    shape = architecture(inputs["model"], config.trust_remote_code)
    extra = outlier_bits(inputs)
    weights = StoredWeights(config.parent_bits + extra, config.group_size)

    def steps_s(prompt_tokens: int, bits: list[int]) -> Seconds:
        return decode_steps_s(npu, shape, prompt_tokens, step_bits(bits, extra), weights)

    def prefill_s(prompt_tokens: int, bits: int) -> float:
        return float(prefill_forward(npu, shape, step_bits([bits], extra)[0], prompt_tokens, weights).total_s)

    completions = read_completions(inputs["evaluation"])
    where = f"on {npu.name}, estimated; {npu.counted}"
    rows = decode_gains("npu", where, completions, steps_s, None, config.resamples, config.seed, extra)
    total_gain = [
        sum(prefill_s(g.prompt_tokens, FP16_BITS) + at(steps_s, g, FP16_BITS).sum() for g in c.generations)
        / sum(prefill_s(g.prompt_tokens, g.schedule.prefill_bits) + own(steps_s, g).sum() for g in c.generations)
        for c in completions
    ]
    total = mean_scores(total_gain).interval(config.resamples, config.seed)
    rows.append(result("npu_total_speedup", f"times fp16, prefill included, {where}", total))
    _write(out, rows)


@dataclass(frozen=True)
class GainConfig:
    """Uniform high beside fp16 as what a schedule is compared with."""

    high_bits: int
    resamples: int
    seed: int


def run_gain(config: GainConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Throughput and paired speed-ups on the machine of the ``latency`` input for the completions of an evaluation.

    A step's time is interpolated between the contexts that were timed; beyond them it is that of the nearest.
    """
    timing = read_json(inputs["latency"] / RESULTS_FILE)
    table = {
        bits: np.array(sorted((r["context_tokens"], r["median_ms"]) for r in timing["rows"] if r["bits"] == bits)).T
        for bits in {r["bits"] for r in timing["rows"]}
    }

    def steps_s(prompt_tokens: int, bits: list[int]) -> Seconds:
        context = prompt_tokens + np.arange(1, len(bits) + 1)
        times_ms = {b: np.interp(context, *table[b]) for b in set(bits)}
        return np.array([times_ms[b][t] for t, b in enumerate(bits)]) / 1e3

    where = f"on {timing['machine']}, measured steps; {timing['engine']}; {timing['weights']}"
    completions = read_completions(inputs["evaluation"])
    _write(out, decode_gains("gpu", where, completions, steps_s, config.high_bits, config.resamples, config.seed))


def decode_gains(
    kind: str,
    where: str,
    completions: list[Completion],
    steps_s: StepsS,
    high_bits: int | None,
    resamples: int,
    seed: int,
    extra_bits: float = 0.0,
) -> list[dict[str, Any]]:
    """Results of decoding alone, quantities prefixed with ``kind``; samples without a decode step are left out.

    The speed-up of a sample is the fp16 (or uniform high) time of the *same* steps (same prompt, same number of
    tokens, same contexts) over its own, so it does not mix in that another precision writes longer or shorter.
    ``extra_bits``: what outliers add to a nested step's bits.
    """
    rate, gain, gain_over_high, time_bits = [], [], [], []
    for completion in completions:
        generations = [g for g in completion.generations if g.decode_bits]
        if not generations:
            continue
        seconds = np.concatenate([own(steps_s, g) for g in generations])
        rate.append(len(seconds) / seconds.sum())
        gain.append(sum(at(steps_s, g, FP16_BITS).sum() for g in generations) / seconds.sum())
        if high_bits is not None:
            gain_over_high.append(sum(at(steps_s, g, high_bits).sum() for g in generations) / seconds.sum())
        time_bits.append(seconds @ np.asarray(step_bits(completion.decode_bits, extra_bits)) / seconds.sum())
    quantities = (
        (f"{kind}_decode_throughput", f"tokens/s {where}", rate),
        (f"{kind}_decode_speedup", f"times fp16 {where}", gain),
        (f"{kind}_decode_speedup_over_high", f"times uniform {high_bits} bits {where}", gain_over_high),
        ("average_bits_time", f"bits, weighted by decode time {where}", time_bits),
    )
    return [result(name, unit, mean_scores(v).interval(resamples, seed)) for name, unit, v in quantities if v]


def own(steps_s: StepsS, generation: Generation) -> Seconds:
    """Seconds of the decode steps as they were taken."""
    return steps_s(generation.prompt_tokens, generation.decode_bits)


def at(steps_s: StepsS, generation: Generation, bits: int) -> Seconds:
    """Seconds that the same steps would have taken at ``bits``."""
    return steps_s(generation.prompt_tokens, [bits] * len(generation.decode_bits))


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    write_json(out / RESULTS_FILE, rows)
    write_summary(out, {r["quantity"]: r["value"] for r in rows}, tables={"results": rows})


ESTIMATE = Stage("estimate", 2, EstimateConfig, run_estimate, "milliseconds")
GAIN = Stage("gain", 1, GainConfig, run_gain, "milliseconds")
