"""Times on the device at hand: a decode step at every precision, and the linear layers alone.

Where a time was measured is part of its key, so a store holds one record for each machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig

from pmpd.artifacts import write_json
from pmpd.decode import CPU_FORWARD, FUSED_GRAPHS, decode, fastest, graphed, prefill, random_llama
from pmpd.hardware import conditions, self_cuda_us, time_steps
from pmpd.models import architecture, context_length
from pmpd.records import FP16_BITS, Schedule, Step
from pmpd.schedulers import Fixed
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.evaluate import RESULTS_FILE
from pmpd.stages.runtime import load, progress

WARMUP, REPEATS = 1, 3


@dataclass(frozen=True)
class LatencyConfig:
    """Decode steps of one sequence.

    Attributes:
        contexts: tokens in the cache in the middle of the steps timed; those without room in the model are left out.
        random: configuration values of a Llama-family model with random weights, timed instead of the inputs.
        machine: see :func:`pmpd.hardware.machine`; what a record is of.
    """

    bits: list[int]
    contexts: list[int]
    num_tokens: int
    random: dict[str, Any] | None
    runtime: RuntimeConfig
    machine: str


def run_latency(config: LatencyConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Median milliseconds of a step at each context and precision; how steps were taken is named."""
    runtime = config.runtime
    if config.random is not None:
        settings = AutoConfig.for_model(**config.random)
        nested = [b for b in config.bits if b != FP16_BITS]
        model: Any
        model, cell = random_llama(settings, nested, device=runtime.device, dtype=runtime.torch_dtype)
        limit, weights, engine = settings.max_position_embeddings, "random weights", CPU_FORWARD
        if runtime.device == "cuda":
            model, engine = graphed(model, cell), FUSED_GRAPHS
    else:
        loaded = load(inputs["model"], inputs["nested"], dataclasses.replace(runtime, device="cpu"))
        model, cell, engine = fastest(*loaded, runtime.device)
        limit, weights = context_length(inputs["model"], runtime.trust_remote_code), "the model's weights"
    before = config.num_tokens // 2
    longest = limit - config.num_tokens - 1
    contexts = [c for c in config.contexts if before < c <= longest] or [longest]
    if longest <= before:
        raise ValueError(f"budget.timing_tokens={config.num_tokens} leaves no room in the model's context of {limit}")
    generator = torch.Generator().manual_seed(0)  # times do not depend on what the tokens are
    vocab_size = int(model.config.get_text_config().vocab_size)
    rows = []
    for context in progress(contexts, "latency"):
        prompt = torch.randint(vocab_size, (context - before,), generator=generator).tolist()
        for bits in config.bits:

            def steps(bits: int = bits, prompt: list[int] = prompt) -> Iterator[Step]:
                state = prefill(model, cell, [prompt], bits, max_new_tokens=config.num_tokens + 1)
                policy = Fixed(Schedule.uniform(bits)).policy()
                return decode(model, cell, state, policy, max_new_tokens=config.num_tokens + 1, eos_ids=())

            step_ms = 1e3 * np.asarray(time_steps(steps, warmup=WARMUP, repeats=REPEATS))
            rows.append(
                {
                    "bits": bits,
                    "context_tokens": context,
                    "median_ms": float(np.median(step_ms)),
                    "p10_ms": float(np.quantile(step_ms, 0.1)),
                    "p90_ms": float(np.quantile(step_ms, 0.9)),
                    "num_steps": len(step_ms),
                }
            )
    found = {"engine": engine, "weights": weights, **conditions(runtime.device)}
    write_json(out / RESULTS_FILE, {**found, "rows": rows})
    write_summary(
        out,
        found | {f"latency_{r['bits']}_bits_ms": r["median_ms"] for r in rows if r["context_tokens"] == contexts[0]},
        tables={"latency": rows},
    )


@dataclass(frozen=True)
class LinearsConfig:
    """Linear layers as the paper times them: the profiler's self CUDA time, mean over many forwards, one input.

    Attributes:
        shapes: ``[out, in]`` of each; None for those of the ``model`` input.
        forwards: the paper: 100.
    """

    shapes: list[list[int]] | None
    bits: list[int]
    group_size: int | None
    forwards: int
    dtype: str
    machine: str


def run_linears(config: LinearsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Microseconds of each shape at 16 bits and every precision, weights hot in the cache and flushed from it."""
    dtype = RuntimeConfig(config.dtype, "cuda").torch_dtype
    rows = []
    shapes = config.shapes or [list(pair) for pair in sorted(set(architecture(inputs["model"]).linear_shapes))]
    for out_features, in_features in progress(shapes, "linear layers"):
        x = torch.randn(1, in_features, dtype=dtype, device="cuda")
        for bits, forward in _products(x, out_features, config.bits, config.group_size).items():
            rows.append(
                {
                    "out_features": out_features,
                    "in_features": in_features,
                    "bits": bits,
                    "hot_us": self_cuda_us(forward, forwards=config.forwards, flushed=False),
                    "flushed_us": self_cuda_us(forward, forwards=config.forwards, flushed=True),
                    "forwards": config.forwards,
                }
            )
    found = {"weights": "random weights", **conditions("cuda")}
    write_json(out / RESULTS_FILE, {**found, "rows": rows})
    write_summary(out, found, tables={"linears": rows})


def _products(
    x: torch.Tensor, out_features: int, bits: list[int], group_size: int | None
) -> dict[int, Callable[[], torch.Tensor]]:
    """The product of ``x`` with random weights, by precision; 16 is the ordinary linear layer."""
    from pmpd.kernels import cuda

    in_features = x.shape[-1]
    nested = [b for b in bits if b != FP16_BITS]
    shape = (max(nested), out_features, -(-in_features // 32))
    planes = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=x.device)
    groups = -(-in_features // (group_size or in_features))
    tables = {b: torch.randn(out_features, groups, 1 << b, dtype=torch.float16, device=x.device) for b in nested}
    weight = cuda.prepare(planes, tables, in_features, group_size, x.dtype)
    plain = torch.randn(out_features, in_features, dtype=x.dtype, device=x.device)
    products: dict[int, Callable[[], torch.Tensor]] = {FP16_BITS: lambda: functional.linear(x, plain)}
    return products | {b: lambda b=b: cuda.matmul(x, weight, b) for b in nested}  # type: ignore[misc]


LATENCY = Stage("latency", 2, LatencyConfig, run_latency, "seconds")
LINEARS = Stage("linears", 1, LinearsConfig, run_linears, "seconds on a GPU")
