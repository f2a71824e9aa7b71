"""Decode steps on a GPU: microseconds a token at every precision, what a switch costs, what the model takes.

    python benchmarks/decode.py                              the shapes of two models of the paper and two others
    python benchmarks/decode.py --models mobilellama --bits 4 3
    python benchmarks/decode.py --hf                         also transformers' own step in a graph, at 16 bits
    python benchmarks/decode.py --compiled                   the same by torch.compile (a C compiler; a minute a model)
    python benchmarks/decode.py --profile                    each kernel of a block, none overlapping the next; no CSV

Weights are random, of the models' true shapes, made from the configuration alone; batch 1. The steps are those of the
decode loop, an event between each two and no waiting on the host; steps of all precisions alternate in rounds, so that
their ratios are of one run. Writes benchmarks/results/decode.csv, a row a number:

    step        median time between two yields of the loop at one precision
    schedule    mean step of a schedule that goes from the first to the last of --bits half way
    predicted   the same from its steps' precisions and the medians of `step`
    switch      mean step when the precision changes at every step, less the mean of the two medians
    wall        time a token on the host's clock, every token copied to the CPU and compared with an end-of-sequence
    memory      what the model takes on the device, all its precisions and no 16-bit block linears; GiB
    peak        the same with the cache, buffers, and what prefill takes for a moment
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pmpd.decode import State, ahead, decode, prefill
from pmpd.decode.captured import CapturedStep
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama_step import LlamaStep
from pmpd.decode.random import random_llama
from pmpd.hardware.gpu import other_processes
from pmpd.kernels import nvrtc
from pmpd.records import Schedule
from pmpd.schedulers import Planned, Policy

RESULTS = Path(__file__).parent / "results" / "decode.csv"
WARM_UP = 8
"""Steps before the first that counts: graphs are captured in them."""

SHAPES: dict[str, dict[str, Any]] = {
    "vicuna7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mobilellama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "llama3_1_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen2_1_5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
"""In ``config.json``'s words; heads share no keys and the vocabulary has 32000 tokens unless they say so."""


class Alternating:
    """The policy that changes the precision at every step."""

    schedule = None

    def __init__(self, levels: Sequence[int]) -> None:
        self.levels = levels

    def bits(self, step: int, logits: Tensor | None) -> int:
        return self.levels[step % len(self.levels)]


def step_times_us(
    model: Any, cell: Any, prompt: list[int], prefill_bits: int, policy: Policy, steps: int
) -> list[float]:
    """Of a new sequence, as :func:`times_from_us`."""
    state = prefill(model, cell, [prompt], prefill_bits, max_new_tokens=steps + WARM_UP + 1)
    return times_from_us(model, cell, state, policy, steps)


def times_from_us(model: Any, cell: Any, state: State, policy: Policy, steps: int) -> list[float]:
    """Microseconds between the yields of ``steps`` decode steps after the warm-up, by events in the stream. ``state``
    is of prefill, with room for all of them."""
    num_tokens = steps + WARM_UP + 1
    events = []
    for _ in decode(model, cell, state, policy, max_new_tokens=num_tokens, eos_ids=()):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in zip(events[WARM_UP:], events[WARM_UP + 1 :], strict=False)]


def wall_us(model: Any, cell: Any, prompt: list[int], bits: int, steps: int) -> float:
    """Microseconds a token on the host's clock, of a consumer that has every token in hand and looks for an end."""
    num_tokens = steps + WARM_UP + 1
    state = prefill(model, cell, [prompt], bits, max_new_tokens=num_tokens)
    taken = decode(model, cell, state, Planned(Schedule.uniform(bits)), max_new_tokens=num_tokens, eos_ids=())
    for step in ahead(taken, eos_ids=[-1]):
        if step.index == WARM_UP:
            started = time.perf_counter()
    return 1e6 * (time.perf_counter() - started) / steps


def shape(name: str) -> Any:
    return AutoConfig.for_model(
        **{"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096} | SHAPES[name]
    )


def commit_here() -> str:
    """The commit that this file is checked out from, or ``unknown``."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


class Table:
    """Rows of one run, on one device."""

    def __init__(self, context: int, commit: str) -> None:
        self.common = {
            "gpu": torch.cuda.get_device_name(),
            "versions": f"torch {torch.__version__} cuda {torch.version.cuda} transformers {transformers.__version__}",
            "commit": commit,
        }
        self.context = context
        self.rows: list[dict[str, Any]] = []

    def add(self, op: str, provider: str, model: str, bits: str, unit: str, values: Sequence[float]) -> float:
        """Append a row of the values' median and spread; returns the median."""
        ordered = sorted(values)
        median = statistics.median(ordered)
        low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        what = {"op": op, "provider": provider, "model": model, "bits": bits, "m": 1, "context": self.context}
        spread = {"unit": unit, "median": f"{median:.5g}", "p20": f"{low:.5g}", "p80": f"{high:.5g}"}
        self.rows.append({**what, **spread, **self.common})
        rate = f"  {1e6 / median:7.1f} tokens/s" if unit == "us" and op != "switch" else ""
        sys.stdout.write(f"{model:12} {op:10} {provider:16} {bits:>10} bits {median:10.2f} {unit}{rate}\n")
        sys.stdout.flush()
        return median

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def nested_model(table: Table, name: str, bits: list[int], prompt: list[int], steps: int, rounds: int) -> None:
    """Memory, steps at every precision, a schedule, a switch."""
    before = torch.cuda.memory_allocated()
    llama, cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
    assert cell is not None
    cell.prepare(bits[0])  # packed for the device
    table.add(
        "memory", "pmpd", name, f"{bits[-1]}..{bits[0]}", "GiB", [(torch.cuda.memory_allocated() - before) / 2**30]
    )
    torch.cuda.reset_peak_memory_stats()
    model = GraphedModel(llama, cell, LlamaStep(llama))
    times: dict[int, list[float]] = {b: [] for b in bits}
    high, low = bits[0] if len(bits) < 3 else bits[-2], bits[-1]
    half = WARM_UP + steps // 2
    schedule, mixed, alternating = Schedule(high, (high, low), (half,)), [], []
    for _ in range(rounds):
        for b in bits:
            times[b] += step_times_us(model, cell, prompt, b, Planned(Schedule.uniform(b)), steps)
        mixed.append(statistics.mean(step_times_us(model, cell, prompt, high, Planned(schedule), steps)))
        alternating.append(statistics.mean(step_times_us(model, cell, prompt, high, Alternating((high, low)), steps)))
    medians = {b: table.add("step", "pmpd", name, str(b), "us", times[b]) for b in bits}
    counted = [schedule.bits_at(t) for t in range(WARM_UP + 1, WARM_UP + 1 + steps)]
    means = {b: statistics.mean(times[b]) for b in bits}
    measured = table.add("schedule", "pmpd", name, f"{high}->{low}", "us", mixed)
    predicted = table.add(
        "predicted", "pmpd", name, f"{high}->{low}", "us", [statistics.mean(medians[b] for b in counted)]
    )
    sys.stdout.write(f"{'':12} measured over predicted: {measured / predicted:.4f}\n")
    table.add(
        "switch", "pmpd", name, f"{high}<->{low}", "us", [t - (means[high] + means[low]) / 2 for t in alternating]
    )
    walls = [wall_us(model, cell, prompt, low, steps) for _ in range(rounds)]
    table.add("wall", "pmpd", name, str(low), "us", walls)
    table.add("peak", "pmpd", name, f"{low}..{bits[0]}", "GiB", [(torch.cuda.max_memory_allocated() - before) / 2**30])


def fp16_model(table: Table, name: str, prompt: list[int], steps: int, rounds: int) -> None:
    """The same loop and kernels with 16-bit products by cuBLAS."""
    llama, cell = random_llama(shape(name), (), device="cuda")
    model = GraphedModel(llama, cell, LlamaStep(llama))
    policy = Planned(Schedule.uniform(16))
    times = [t for _ in range(rounds) for t in step_times_us(model, cell, prompt, 16, policy, steps)]
    table.add("step", "cublas-fp16", name, "16", "us", times)


def hf_model(table: Table, name: str, prompt: list[int], steps: int, compiled: bool) -> None:
    """transformers' modelling code, its step captured in a graph; ``compiled``: by torch.compile's default mode."""
    with torch.device("cuda"):
        original: Any = AutoModelForCausalLM.from_config(shape(name), dtype=torch.float16).eval()
    stepping = original
    if compiled:
        stepping = copy.copy(original)  # the same weights; prefill stays as it is
        stepping.compile(fullgraph=True, dynamic=False)
    model = GraphedModel(original, None, CapturedStep(stepping))
    times = step_times_us(model, None, prompt, 16, Planned(Schedule.uniform(16)), steps)
    table.add("step", "hf-fp16-compiled" if compiled else "hf-fp16-graph", name, "16", "us", times)


def profile(name: str, bits: list[int], prompt: list[int]) -> None:
    """Print the median time of each kernel of a block at every precision. Kernels do not start early here, so that
    their times are their own; their sum is more than a step takes."""
    nvrtc.PROGRAMMATIC_CAPABILITY = (99, 0)
    llama, cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
    model = GraphedModel(llama, cell, LlamaStep(llama))
    for b in bits:
        state = prefill(model, cell, [prompt], b, max_new_tokens=8)
        steps = decode(model, cell, state, Planned(Schedule.uniform(b)), max_new_tokens=8, eos_ids=())
        for _ in range(4):
            next(steps)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            next(steps)
            torch.cuda.synchronize()
        events = sorted((e.time_range.start, e.name, e.device_time) for e in trace.events())
        times: dict[str, list[float]] = {}
        products = 0
        for _, kernel, us in events:
            label = kernel[:40]
            if kernel == "nested_matmul":
                label = ("qkv", "output", "gate_up", "down")[products % 4]
                products += 1
            times.setdefault(label, []).append(us)
        for label, values in times.items():
            text = f"{len(values):4} x {statistics.median(values):7.2f} us = {sum(values):8.1f} us"
            sys.stdout.write(f"{name:12} {b} bits {label:42} {text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="falling; none: 16 bits alone")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hf", action="store_true", help="transformers' own step in a graph too")
    parser.add_argument("--compiled", action="store_true", help="transformers' own step by torch.compile too")
    parser.add_argument("--commit", help="that this code is of; default: what git says")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="print each kernel's time instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("times are of a GPU, and PyTorch sees none")
    if others := other_processes():
        sys.stderr.write(f"{others} other processes use this GPU: times are of all of them\n")
    table = Table(args.context, args.commit or commit_here())
    prompt = torch.randint(3, 32000, (args.context,), generator=torch.Generator().manual_seed(0)).tolist()
    for name in args.models:
        if args.profile:
            profile(name, args.bits, prompt)
            continue
        if args.bits:
            nested_model(table, name, args.bits, prompt, args.steps, args.rounds)
        gc.collect()
        fp16_model(table, name, prompt, args.steps, args.rounds)
        gc.collect()
        for compiled in [False] * args.hf + [True] * args.compiled:
            hf_model(table, name, prompt, args.steps, compiled)
            gc.collect()
        torch.cuda.empty_cache()
        table.write(args.out)  # what there is, should the next model fail


if __name__ == "__main__":
    main()
