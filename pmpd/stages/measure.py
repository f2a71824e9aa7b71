"""What a schedule gains: estimated on an NPU from the schedules that evaluation used, and timed on this device.

The estimate is a model (``pmpd.hardware.npu``) applied to every sample's own prompt length and bits, step by step.
The timing is of one decode step at each precision; on a CPU it runs on dequantised weights and says
nothing about bits.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpd.artifacts import write_json
from pmpd.decode import decode, prefill
from pmpd.hardware import time_steps
from pmpd.hardware.npu import NPU, StoredWeights, generation_s
from pmpd.models import architecture, context_length
from pmpd.records import FP16_BITS, Schedule, Step
from pmpd.schedulers import Fixed
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.evaluate import RESULTS_FILE, read_completions, result
from pmpd.stages.inputs import read_windows
from pmpd.stages.runtime import load, progress
from pmpd.stages.scoring import mean_scores


@dataclass(frozen=True)
class EstimateConfig:
    """The NPU's constants (``conf/hardware``), the nested model's planes and the inputs that share a table."""

    npu: dict[str, Any]
    parent_bits: int
    group_size: int | None
    trust_remote_code: bool
    resamples: int
    seed: int


def run_estimate(config: EstimateConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Throughput and paired speed-up over fp16 for the completions of an evaluation.

    The speed-up of a sample is the fp16 time of the *same* steps (same prompt, same number of tokens, same
    contexts) over its own, so it does not mix in that another precision writes longer or shorter.
    """
    npu = NPU(**config.npu)
    shape = architecture(inputs["model"], config.trust_remote_code)
    weights = StoredWeights(config.parent_bits, config.group_size)
    decode_rate, decode_gain, total_gain, time_bits = [], [], [], []
    for completion in read_completions(inputs["evaluation"]):
        own, fp16 = [], []
        for g in completion.generations:
            own.append(generation_s(npu, shape, g.prompt_tokens, g.schedule.prefill_bits, g.decode_bits, weights))
            bits = [FP16_BITS] * len(g.decode_bits)
            fp16.append(generation_s(npu, shape, g.prompt_tokens, FP16_BITS, bits, weights))
        steps_s, fp16_steps_s = (np.concatenate([steps for _, steps in times]) for times in (own, fp16))
        if len(steps_s):
            decode_rate.append(len(steps_s) / steps_s.sum())
            decode_gain.append(fp16_steps_s.sum() / steps_s.sum())
            time_bits.append(steps_s @ np.asarray(completion.decode_bits) / steps_s.sum())
        prefill_s, fp16_prefill_s = (sum(first for first, _ in times) for times in (own, fp16))
        total_gain.append((fp16_prefill_s + fp16_steps_s.sum()) / (prefill_s + steps_s.sum()))
    rows = []
    for quantity, unit, values in (
        ("npu_decode_throughput", f"tokens/s on {npu.name}, estimated; {npu.counted}", decode_rate),
        ("npu_decode_speedup", f"times fp16 on {npu.name}, estimated; {npu.counted}", decode_gain),
        ("npu_total_speedup", f"times fp16 on {npu.name}, prefill included, estimated; {npu.counted}", total_gain),
        ("average_bits_time", f"bits, weighted by decode time on {npu.name}", time_bits),
    ):
        if values:
            rows.append(result(quantity, unit, mean_scores(values).interval(config.resamples, config.seed)))
    write_json(out / RESULTS_FILE, rows)
    write_summary(out, {r["quantity"]: r["value"] for r in rows}, tables={"results": rows})


@dataclass(frozen=True)
class LatencyConfig:
    """Decode steps timed on the device at hand, batch 1."""

    bits: list[int]
    num_tokens: int
    context_tokens: int
    runtime: RuntimeConfig


def run_latency(config: LatencyConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Median milliseconds of a decode step at each precision, with the device and the kind of kernel named."""
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    limit = context_length(inputs["model"], config.runtime.trust_remote_code) - config.num_tokens - 1
    prompt = read_windows(inputs["texts"]).flatten()[: min(config.context_tokens, limit)].tolist()
    rows = []
    for bits in progress(config.bits, "latency"):

        def steps(bits: int = bits) -> Iterator[Step]:
            state = prefill(model, cell, [prompt], bits, max_new_tokens=config.num_tokens + 1)
            policy = Fixed(Schedule.uniform(bits)).policy()
            return decode(model, cell, state, policy, max_new_tokens=config.num_tokens + 1, eos_ids=())

        seconds = np.asarray(time_steps(steps, warmup=1, repeats=3))
        rows.append(
            {
                "bits": bits,
                "median_ms": float(np.median(seconds) * 1e3),
                "p10_ms": float(np.quantile(seconds, 0.1) * 1e3),
                "p90_ms": float(np.quantile(seconds, 0.9) * 1e3),
                "num_steps": len(seconds),
                "context_tokens": len(prompt),
            }
        )
    device = torch.cuda.get_device_name() if config.runtime.device == "cuda" else _cpu_name()
    write_json(out / RESULTS_FILE, {"device": device, "weights": "dequantised, no claim about bits", "rows": rows})
    write_summary(
        out,
        {"device": device, "weights": "dequantised, no claim about bits"}
        | {f"latency_{r['bits']}_bits_ms": r["median_ms"] for r in rows},
        tables={"latency": rows},
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


ESTIMATE = Stage("estimate", 2, EstimateConfig, run_estimate, "milliseconds")
LATENCY = Stage("latency", 1, LatencyConfig, run_latency, "seconds")
