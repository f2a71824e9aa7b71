"""How long an evaluation and the learned scheduler's labels take, on the device at hand, batched with left padding.

    python benchmarks/evaluation.py --data-root DIR                      300 DialogSum prompts at one precision
    python benchmarks/evaluation.py --data-root DIR --labels             labels of 256 seed prompts too, M = 256
    python benchmarks/evaluation.py --data-root DIR --batch-sizes 16 64

``DIR`` holds ``dialogsum/test`` and ``c4/validation``. What does not depend on the batch (weights, quantising, prompts)
is built first and not timed; what is timed is the stages themselves, prompts read and answers written. Answers at
different batch sizes are compared: left padding changes none but near ties of logits in the model's dtype.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipelines.grid import compose_grid
from pipelines.learning import labels
from pipelines.plan import Planner
from pmpd.artifacts import Node, Store
from pmpd.config import Config
from pmpd.records import Completion, Schedule
from pmpd.stages import execute, read_summary
from pmpd.stages.rollouts import read_rollouts


def configuration(args: argparse.Namespace, batch_size: int, store: Path) -> Config:
    _, [config] = compose_grid(
        [
            "model=smollm2",
            "task=dialogsum",
            "scheduler=high",
            f"budget={args.budget}",
            f"budget.test_samples={args.prompts}",
            f"budget.seed_prompts={args.seeds}",
            f"budget.seed_new_tokens={args.seed_tokens}",
            f"budget.batch_size={batch_size}",
            f"data.root={args.data_root}",
            f"store={store}",
        ]
    )
    return config


def timed(node: Node, store: Store) -> float:
    """Seconds of ``node`` alone."""
    for parent in node.inputs.values():
        if isinstance(parent, Node):
            store.materialize(parent, execute)
    start = time.perf_counter()
    store.materialize(node, execute)
    return time.perf_counter() - start


def answers(path: Path) -> dict[str, Completion]:
    [completions] = read_rollouts(path).values()
    return completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--budget", default="twin", help="how the model is quantised, and most tokens an answer")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--labels", action="store_true", help="time the labels too, at the last batch size")
    parser.add_argument("--seeds", type=int, default=256)
    parser.add_argument("--seed-tokens", type=int, default=256)
    parser.add_argument("--store", type=Path, help="keep what is built here; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(args.store or Path(scratch))
        found: dict[int, dict[str, Completion]] = {}
        for size in args.batch_sizes:
            config = configuration(args, size, store.root)
            planner = Planner(config, store)
            levels = planner.precisions()
            prompts = planner.prompts(config.task.test_split, config.budget.test_samples)
            node = planner.rollout(prompts, [Schedule.uniform(levels.high)], planner.max_new_tokens)
            seconds = timed(node, store)
            numbers = read_summary(store.verify(node))["metrics"]
            found[size] = answers(store.verify(node))
            base = found[args.batch_sizes[0]]
            equal = sum(found[size][i].generations[0].token_ids == base[i].generations[0].token_ids for i in base)
            sys.stdout.write(
                f"{numbers['num_samples']} DialogSum prompts at {levels.high} bits, at most {planner.max_new_tokens} "
                f"tokens, batch {size}, {torch.get_num_threads()} threads: {seconds / 60:.1f} min, "
                f"{numbers['generated_tokens']} tokens; {equal} of {len(base)} answers as at {args.batch_sizes[0]}\n"
            )
            sys.stdout.flush()
        if args.labels:
            node = labels(planner, config, levels.levels, levels.high)
            parts = {name: timed(parent, store) for name, parent in node.inputs.items() if isinstance(parent, Node)}
            parts["labels"] = timed(node, store)
            sys.stdout.write(
                f"labels of {args.seeds} seed prompts, {args.seed_tokens} tokens, batch {args.batch_sizes[-1]}: "
                f"{sum(parts.values()) / 60:.1f} min "
                f"({', '.join(f'{name} {seconds:.0f} s' for name, seconds in parts.items())})\n"
            )


if __name__ == "__main__":
    main()
