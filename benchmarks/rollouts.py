"""What rollouts save, the two savings apart: fewer decoded tokens by forking, more tokens a second by batching.

    python benchmarks/rollouts.py                                    a small random Llama, seconds
    python benchmarks/rollouts.py --model DIR --new-tokens 64        any folder with a model
    python benchmarks/rollouts.py --model DIR --nested DIR           at the precisions of its nested model

The schedules are those of a static fit: uniform high, uniform low, and a switch at 0, M/3, 2M/3, M. Without a nested
model every precision runs on the same weights: the times are those of dequantised weights, which do not depend
on bits. Every repeat runs every variant, and ratios are of medians. Sequences that differ between batch sizes come
from near ties of logits in the model's dtype; in float64 there are none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pmpd.decode import TreeStats, context_limit, decode_schedules
from pmpd.models import attach, load_model
from pmpd.records import Schedule, schedule_family, switch_grid

Tokens = dict[Schedule, list[list[int]]]


class OnePrecision:
    """Stands for the cell of a quantised model where there is none: every precision is the same weights."""

    bits = 16


def random_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def random_prompts(model: Any, count: int, longest: int) -> list[list[int]]:
    """Ids of lengths from half of ``longest`` to ``longest``, in order of length as the rollouts stage sorts them."""
    generator = torch.Generator().manual_seed(1)
    lengths = sorted(longest - k * longest // (2 * count) for k in range(count))
    vocab = model.config.get_text_config().vocab_size
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def in_batches(
    model: nn.Module,
    cell: Any,
    prompts: list[list[int]],
    schedules: list[Schedule],
    m: int,
    size: int,
    stats: TreeStats,
) -> Tokens:
    done: Tokens = {schedule: [] for schedule in schedules}
    for start in range(0, len(prompts), size):
        part = decode_schedules(
            model, cell, prompts[start : start + size], schedules, max_new_tokens=m, eos_ids=(), stats=stats
        )
        for schedule, answers in part.items():
            done[schedule] += answers
    return done


def alone(
    model: nn.Module,
    cell: Any,
    prompts: list[list[int]],
    schedules: list[Schedule],
    m: int,
    size: int,
    stats: TreeStats,
) -> Tokens:
    """Every schedule by itself: nothing shared but the batch."""
    done: Tokens = {}
    for schedule in schedules:
        done |= in_batches(model, cell, prompts, [schedule], m, size, stats)
    return done


def equal_sequences(a: Tokens, b: Tokens) -> str:
    pairs = [(x, y) for schedule in a for x, y in zip(a[schedule], b[schedule], strict=True)]
    return f"{sum(x == y for x, y in pairs)}/{len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; default: a small random one")
    parser.add_argument("--nested", type=Path, help="folder of its nested model (artifact of the quantize stage)")
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 3), metavar=("HIGH", "LOW"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model: Any = load_model(args.model, dtype, args.device) if args.model else random_model(dtype).to(args.device)
    if args.nested and not args.model:
        parser.error("--nested needs --model")
    cell: Any = attach(model, args.nested) if args.nested else OnePrecision()
    high, low = args.bits
    m, sizes = args.new_tokens, sorted({*args.batch_sizes})
    schedules = [Schedule.uniform(high), Schedule.uniform(low), *schedule_family(high, (high, low), switch_grid(m))]
    prompts = random_prompts(model, args.prompts, args.prompt_tokens)
    limit = context_limit(model)
    if limit is not None and args.prompt_tokens + m > limit:
        parser.error(f"--prompt-tokens {args.prompt_tokens} and --new-tokens {m} exceed the context of {limit}")

    uniform = [Schedule.uniform(high)]
    variants: dict[str, Callable[[TreeStats], Tokens]] = {
        f"uniform, batch {size}": partial(in_batches, model, cell, prompts, uniform, m, size) for size in sizes
    }
    variants["schedules alone"] = partial(alone, model, cell, prompts, schedules, m, sizes[-1])
    variants["schedules forked"] = partial(in_batches, model, cell, prompts, schedules, m, sizes[-1])

    for warm_up in (high, low):  # dequantises, and finds its kernels
        in_batches(model, cell, prompts, [Schedule.uniform(warm_up)], 2, sizes[-1], TreeStats())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens: dict[str, Tokens] = {}
    stats: dict[str, TreeStats] = {}
    for _ in range(args.repeats):
        for name, variant in variants.items():
            stats[name] = TreeStats()
            start = time.perf_counter()
            tokens[name] = variant(stats[name])
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    first, last = (f"uniform, batch {size}" for size in (sizes[0], sizes[-1]))
    references = dict.fromkeys(variants, first) | {"schedules forked": "schedules alone", "schedules alone": ""}
    write = sys.stdout.write
    write(
        f"{args.model.name if args.model else 'random Llama'}, {args.dtype}, {args.device}, "
        f"{torch.get_num_threads()} threads; {args.prompts} prompts of {len(prompts[0])} to {args.prompt_tokens} "
        f"tokens, {m} new; {len(schedules)} schedules; medians of {args.repeats} runs, prefill included\n\n"
    )
    write(f"{'':22}{'seconds':>9}{'spread':>9}{'forwards':>10}{'decoded':>9}{'tokens/s':>10}{'speed-up':>10}  equal\n")
    for name in variants:
        reference = references[name]
        spread = (max(seconds[name]) - min(seconds[name])) / median[name]
        gain = f"{median[reference] / median[name]:.2f}" if reference else "1.00"
        equal = equal_sequences(tokens[name], tokens[reference]) if reference else "-"
        done = stats[name].decoded_tokens
        write(
            f"{name:22}{median[name]:9.2f}{spread:9.0%}{stats[name].forwards:10}{done:9}"
            f"{done / median[name]:10.1f}{gain:>10}  {equal}\n"
        )
    fewer = stats["schedules alone"].decoded_tokens / stats["schedules forked"].decoded_tokens
    write(
        f"\nforking: {fewer:.2f} times fewer decoded tokens, "
        f"{median['schedules alone'] / median['schedules forked']:.2f} times faster\n"
        f"batching: {median[first] / median[last]:.2f} times faster at batch {sizes[-1]} than at {sizes[0]}\n"
    )


if __name__ == "__main__":
    main()
