"""Measures which launches of the GPU kernels are fast: pmpd/kernels/launches.csv, which `launch.choose` reads.

    python benchmarks/launches.py                              all of it
    python benchmarks/launches.py --bits 2 --rows 1            replaces these rows, keeps the others
    python benchmarks/launches.py --same-divisions             keeps how the work is divided: quicker
    python benchmarks/launches.py --thorough                   more queues and times: slower
    python benchmarks/launches.py --chain                      products in a model's step, beside each other

For each product and each method (look-up or bit planes, with and without clusters) many ways of dividing the work
among warps are tried with a few depths of the queue of weights, then the best of them, and the one that the table
has, with all depths, all times for the next kernel to come and all that weights may be held back; the fastest of all
are timed again, longer. (A descent, one choice at a time, ends up to a fifth above that: the best queue of one
division is not another's.) Products are timed as in nested_matmul.py; launch_chains.py has how it is done in a chain.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES as MODELS
from launch_chains import chains
from launch_choices import (
    EVERY_QUEUE,
    EVERY_TIME,
    QUEUES,
    RESULTS,
    START,
    TIMES,
    Changes,
    Method,
    Table,
    architecture,
    compile_all,
    divide,
    every,
    fit,
    methods,
    queues,
    times,
)
from nested_matmul import REPLAYS, inputs, pmpd_weights, replay_us
from products import SHAPES, Case, shape

from pmpd.kernels import launch, product
from pmpd.kernels.launch import Launch

SMALL_SHAPES = [(576, 576), (3072, 576), (576, 1536)]
TEAMS = (1, 2, 3, 4, 6, 8)
"""Of warps, each with its own tiles."""
FEW_QUEUES = [(2, 2), (4, 2), (4, 4)]
"""Of these what every division of the work is tried with."""
FINALISTS = 8
"""Fastest launches, whose divisions of the work are tried further, and which are timed again."""
FEW_TIMES = [(2, 0), (0, 500)]
"""Of ``TIMES`` what every division of the work is tried with."""
FEW_REPLAYS = 4
"""For the time of a launch that may become one of them."""


def divisions(method: Method, in_features: int) -> Changes:
    """What a search tries: from four warps on, all with a part of the work."""
    pairs, steps = itertools.product(range(1, launch.MAX_WARPS + 1), TEAMS), -(-in_features // launch.STEP)
    return [
        division
        for division in divide(pairs, method, in_features)
        if division["splits"] <= steps
        and 4 <= division["splits"] // method.cluster * division["teams"] <= launch.MAX_WARPS
    ]


@dataclass
class Search:
    """For the launch of one product by one method.

    Attributes:
        known: the launch so far, which is among those tried: with few depths of the queue its division may look slow.
        same_division: whether no division but that of ``known`` is tried.
        thorough: whether more queues and times are tried.
        times: microseconds, of the launches tried so far.
    """

    case: Case
    method: Method
    gpu: product.Gpu
    known: Launch | None = None
    same_division: bool = False
    thorough: bool = False
    times: dict[Launch, float] = field(default_factory=dict)

    @property
    def divisions(self) -> Changes:
        if self.same_division:
            return [{"splits": plan.splits, "teams": plan.teams} | asdict(self.method) for plan in self._known]
        return divisions(self.method, self.case.in_features)

    def plans(
        self, divided: Changes, pairs: Sequence[tuple[int, int]], when: Sequence[tuple[int, int]], alone: Sequence[bool]
    ) -> set[Launch]:
        """Launches that this GPU has the memory for as they are, if perhaps with more blocks."""
        wanted = every(START, [divided, queues(pairs), times(when), [{"alone": value} for value in alone]])
        return {plan for plan in wanted if self._fits(plan)}

    @property
    def _axes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Queues and times that the fastest divisions are tried with."""
        return (EVERY_QUEUE, EVERY_TIME) if self.thorough else (QUEUES, TIMES)

    @property
    def _known(self) -> set[Launch]:
        return {plan for plan in [self.known] if plan and self._fits(plan)}

    def _fits(self, plan: Launch) -> bool:
        try:
            fitted = fit(plan, self.case, self.gpu)
        except ValueError:
            return False
        as_it_is = replace(fitted, blocks=plan.blocks, rows=plan.rows, spread=plan.spread) == plan
        return as_it_is and fitted.rows >= self.case.m

    def run(self, time: Callable[[Launch, int], float]) -> Launch | None:
        """The fastest launch, by ``time(launch, replays)``; None if no memory for those of ``FEW_QUEUES``."""
        if not self.same_division:
            self._try(self.plans(self.divisions, FEW_QUEUES, FEW_TIMES, [False]), time)
        best = {(plan.splits, plan.teams) for plan in [*self._fastest(), *self._known]}
        chosen = [division for division in self.divisions if (division["splits"], division["teams"]) in best]
        small = self.case.out_features <= launch.TILE * self.gpu.processors
        self._try(self.plans(chosen, *self._axes, [False, True] if small else [False]) | self._known, time)
        again = {plan: statistics.median(time(plan, REPLAYS) for _ in range(3)) for plan in self._fastest()}
        self.times |= again
        return min(again, key=again.__getitem__, default=None)

    def _try(self, plans: set[Launch], time: Callable[[Launch, int], float]) -> None:
        for plan in sorted(plans - self.times.keys(), key=repr):
            self.times[plan] = time(plan, FEW_REPLAYS)

    def _fastest(self) -> list[Launch]:
        return sorted(self.times, key=self.times.__getitem__)[:FINALISTS]

    def variants(self) -> set[product.Variant]:
        """Programs that it may need."""
        plans = self.plans(self.divisions, *self._axes, [False]) | self._known
        return {variant(fit(plan, self.case, self.gpu), self.case) for plan in plans}


def variant(plan: Launch, case: Case) -> product.Variant:
    return product.Variant.of(plan, case.bits, torch.float16, product.Fused(), (case.out_features, case.in_features), 1)


def products(
    bits: list[int],
    rows: list[int],
    shapes: list[tuple[int, int]],
    wanted: list[str],
    table: Table,
    *,
    same_divisions: bool = False,
    thorough: bool = False,
) -> None:
    """A row for each product and method, where a launch fits."""
    gpu = product.describe(torch.cuda.current_device())
    cases = [Case(b, m, *sizes) for b in bits for m in rows for sizes in shapes]
    searches = {
        case: [
            Search(case, method, gpu, table.known(case, method), same_divisions, thorough)
            for method in methods(case.bits, case.m)
            if not wanted or method.name in wanted
        ]
        for case in cases
    }
    compile_all((v for group in searches.values() for search in group for v in search.variants()), architecture(gpu))
    for case, group in searches.items():
        operands, x = [product.Operand.of(weight, case.bits) for weight in pmpd_weights(case)], inputs(case)
        out = torch.empty(case.m, case.out_features, device="cuda", dtype=torch.float16)

        def microseconds(
            plan: Launch, replays: int, operands: list[Any] = operands, x: Any = x, out: Any = out
        ) -> float:
            call = functools.partial(product.multiply, x, fused=product.Fused(), out=out, plan=plan)
            return statistics.median(replay_us(lambda i: call(weight=operands[i]), len(operands), replays))

        for search in group:
            if best := search.run(microseconds):
                table.add(case, best, search.times[best], gpu.processors)
            else:
                print(f"{case} {search.method.name}: no launch fits, nothing changed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        default=SHAPES + SMALL_SHAPES,
        help="as 4096x4096; default: those of nested_matmul.py and SmolLM2's",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        help="as planes-2: bit planes, clusters of two; default: all",
    )
    parser.add_argument("--same-divisions", action="store_true", help="try those of the file alone; not with --chain")
    parser.add_argument("--thorough", action="store_true", help="try more queues and times; not with --chain")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, help="with --chain, whose steps; default: all"
    )
    parser.add_argument("--commit", help="what to record, where there is no repository")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("times are of a GPU, and PyTorch sees none")
    git = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "gpu": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        "commit": args.commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
    }
    table = Table(args.out, record)
    if args.chain:
        chains(args.bits, args.models, table)
    else:
        products(
            *(args.bits, args.rows, args.shapes, args.methods, table),
            same_divisions=args.same_divisions,
            thorough=args.thorough,
        )


if __name__ == "__main__":
    main()
