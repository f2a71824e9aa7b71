"""Measures which launches of the GPU kernels are fast: pmpd/kernels/launches.csv, which `launch.choose` reads.

    python benchmarks/launches.py                              all of it
    python benchmarks/launches.py --bits 2 --rows 1            replaces these rows, keeps the others
    python benchmarks/launches.py --chain                      products in a model's step, beside each other

For each product and each method (look-up or bit planes, with and without clusters) many ways of dividing the work among
warps are tried with a few depths of the queue of weights, then the best of them with all depths; the fastest of all are
timed again, longer. (A descent, one choice at a time, ends up to a fifth above that: the best queue of one division is
not another's.) Programs are compiled by all cores first. Products are timed as in nested_matmul.py. In a chain, where
what counts is the time of the whole block, as in chain.py, each try takes longer, and a descent it is.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from chain import Chain
from nested_matmul import REPLAYS, inputs, pmpd_weights, replay_us
from products import SHAPES, Case, write_rows

from pmpd.kernels import launch, nvrtc, product
from pmpd.kernels.launch import Launch

RESULTS = Path(launch.__file__).parent / "launches.csv"
SMALL_SHAPES = [(576, 576), (3072, 576), (576, 1536)]
COLUMNS = [
    *("chain", "bits", "m", "out_features", "in_features", "processors", "planes", "cluster"),
    *("splits", "teams", "stages", "early", "late", "alone", "median", "gpu", "versions", "commit"),
]
WARPS = {  # (of a block for a tile, teams)
    False: [(2, 4), (4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 2), (11, 1), (16, 1)],
    True: [(1, 4), (2, 2), (2, 4), (4, 1), (4, 2), (6, 1), (7, 1), (8, 1)],
}
MORE_WARPS = [(2, 6), (4, 3), (4, 4), (7, 2), (8, 2), (11, 1), (16, 1)]
"""By planes where registers allow: two bits."""
TEAMS = (1, 2, 3, 4, 6, 8)
QUEUES = [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 1), (4, 2), (6, 2), (8, 4)]
"""Stages, and of these early."""
FEW_QUEUES = [(1, 1), (2, 2), (3, 3), (4, 2)]
"""Of these what every division of the work is tried with."""
START = Launch(4, 2, 3, 2, True)
FINALISTS = 8
"""Fastest launches, whose divisions of the work are tried further, and which are timed again."""
FEW_REPLAYS = 4
"""For the time of a launch that may become one of them."""


@dataclass(frozen=True)
class Method:
    planes: bool
    cluster: int

    @property
    def name(self) -> str:
        return f"{'planes' if self.planes else 'lookup'}-{self.cluster}"


MOST_SETS = 28
"""Products of planes and rows of x above which bit planes are not tried."""


def methods(bits: int, rows: int) -> list[Method]:
    found = [Method(False, cluster) for cluster in (1, 2)[: 1 if rows == 1 else 2]]
    if bits <= launch.PLANES_MAX_BITS and (2**bits - 1) * rows <= MOST_SETS:
        found += [Method(True, 1), Method(True, 2)]
    return found


Changes = list[dict[str, Any]]
"""Of a launch: choices of one kind."""
Axes = list[Changes]


def axes(bits: int, method: Method, in_features: int) -> Axes:
    """Choices of each axis that a descent goes along."""
    pairs = WARPS[method.planes] + (MORE_WARPS if method.planes and bits == 2 else [])
    return [divide(pairs, method, in_features), queues(QUEUES), [{"late": late} for late in (True, False)]]


def divide(pairs: Iterable[tuple[int, int]], method: Method, in_features: int) -> Changes:
    """Ways of dividing the work of a block among its warps.

    Args:
        pairs: of warps for a tile, of which no more are taken than leave the busiest as few steps, and teams.
    """
    steps = -(-in_features // launch.STEP)
    found = {}
    for own, teams in pairs:
        splits = min(own, max(1, steps // method.cluster)) * method.cluster
        splits = -(-steps // -(-steps // splits))
        splits = -(-splits // method.cluster) * method.cluster
        found[splits, teams] = {"splits": splits, "teams": teams} | asdict(method)
    return list(found.values())


def divisions(method: Method, in_features: int) -> Changes:
    """What a search tries: from four warps on, all with a part of the work."""
    pairs, steps = itertools.product(range(1, launch.MAX_WARPS + 1), TEAMS), -(-in_features // launch.STEP)
    return [
        division
        for division in divide(pairs, method, in_features)
        if division["splits"] <= steps
        and 4 <= division["splits"] // method.cluster * division["teams"] <= launch.MAX_WARPS
    ]


def queues(pairs: Iterable[tuple[int, int]]) -> Changes:
    return [{"stages": stages, "early": early} for stages, early in pairs]


def every(start: Launch, choices: Axes) -> Iterator[Launch]:
    for changes in itertools.product(*choices):
        yield functools.reduce(lambda plan, change: replace(plan, **change), changes, start)


@functools.cache
def _pool() -> Any:
    return multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1))


def compile_all(variants: Iterable[product.Variant], architecture: str) -> None:
    """Into the cache on disk, by all cores at once."""
    unique = sorted(set(variants), key=repr)
    _pool().starmap(_compile, [(variant, architecture) for variant in unique], chunksize=4)


def _compile(variant: product.Variant, architecture: str) -> None:
    nvrtc.compiled(variant.source, variant.options, architecture)


def architecture(gpu: product.Gpu) -> str:
    return "sm_{}{}".format(*gpu.capability)


class Table:
    """The file of launches, kept up to date row by row."""

    def __init__(self, path: Path, record: dict[str, str]) -> None:
        self.path, self.record = path, record
        self.rows: dict[tuple[int, ...], dict[str, Any]] = {}
        if path.exists():
            with path.open(encoding="utf-8") as file:
                self.rows = {_key(row): row for row in csv.DictReader(file)}

    def forget_chain(self, bits: int, shapes: Collection[tuple[int, int]]) -> None:
        """Launches that did well beside others than those that come now."""
        gone = {(1, bits, 1, *shape) for shape in shapes}
        self.rows = {key: row for key, row in self.rows.items() if key[:5] not in gone}

    def add(self, case: Case, plan: Launch, us: float, processors: int, chain: int = 0) -> None:
        row = self.record | {
            **{"chain": chain, "bits": case.bits, "m": case.m, "processors": processors, "median": f"{us:.3f}"},
            **{"out_features": case.out_features, "in_features": case.in_features},
            **{key: str(int(getattr(plan, key))) for key in COLUMNS[6:14]},
        }
        self.rows[_key(row)] = row
        sys.stdout.write(f"{case} chain {chain}: {us:.2f} us {plan}\n")
        sys.stdout.flush()
        write_rows(self.path, COLUMNS, (self.rows[key] for key in sorted(self.rows)))


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    """What a row is about."""
    names = ("chain", "bits", "m", "out_features", "in_features", "planes", "cluster")
    return tuple(int(row[name]) for name in names)


@dataclass
class Descent:
    """The way from one launch of a product by one method to a better one, one axis at a time."""

    choices: Axes
    best: Launch
    times: dict[Launch, float] = field(default_factory=dict)

    def step(self, axis: int, time: Callable[[Launch], float]) -> None:
        candidates = [self.best, *(replace(self.best, **change) for change in self.choices[axis])]
        for plan in candidates:
            if plan not in self.times:
                self.times[plan] = time(plan)
        self.best = min(candidates, key=self.times.__getitem__)


@dataclass
class Search:
    """For the launch of one product by one method.

    Attributes:
        times: microseconds, of the launches tried so far.
    """

    case: Case
    method: Method
    gpu: product.Gpu
    times: dict[Launch, float] = field(default_factory=dict)

    @property
    def divisions(self) -> Changes:
        return divisions(self.method, self.case.in_features)

    def plans(self, divided: Changes, pairs: Sequence[tuple[int, int]], alone: Sequence[bool]) -> set[Launch]:
        """Launches that this GPU has the memory for as they are, if perhaps with more blocks."""
        late = [{"late": late} for late in (True, False)]
        wanted = every(START, [divided, queues(pairs), late, [{"alone": alone} for alone in alone]])
        return {plan for plan in wanted if self._fits(plan)}

    def _fits(self, plan: Launch) -> bool:
        try:
            fitted = fit(plan, self.case, self.gpu)
        except ValueError:
            return False
        return replace(fitted, blocks=plan.blocks, rows=plan.rows) == plan and fitted.rows >= self.case.m

    def run(self, time: Callable[[Launch, int], float]) -> Launch | None:
        """The fastest launch, by ``time(launch, replays)``; None if this GPU has the memory for none."""
        self._try(self.plans(self.divisions, FEW_QUEUES, [False]), time)
        best = {(plan.splits, plan.teams) for plan in self._fastest()}
        chosen = [division for division in self.divisions if (division["splits"], division["teams"]) in best]
        small = self.case.out_features <= launch.TILE * self.gpu.processors
        self._try(self.plans(chosen, QUEUES, [False, True] if small else [False]), time)
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
        plans = self.plans(self.divisions, QUEUES, [False])
        return {variant(fit(plan, self.case, self.gpu), self.case) for plan in plans}


def variant(plan: Launch, case: Case) -> product.Variant:
    return product.Variant.of(plan, case.bits, torch.float16, product.Fused(), case.in_features, 1)


def products(bits: list[int], rows: list[int], shapes: list[tuple[int, int]], wanted: list[str], table: Table) -> None:
    """A row for each product and method, where a launch fits."""
    gpu = product.describe(torch.cuda.current_device())
    cases = [Case(b, m, *shape) for b in bits for m in rows for shape in shapes]
    searches = {
        case: [
            Search(case, method, gpu) for method in methods(case.bits, case.m) if not wanted or method.name in wanted
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


def fit(plan: Launch, case: Case, gpu: product.Gpu) -> Launch:
    sizes = (case.bits, case.out_features, case.in_features)
    return launch.fit(plan, *sizes, 1, case.m, gpu.processors, gpu.shared_bytes)


def chains(bits: list[int], models: list[str], table: Table) -> None:
    """First with look-up alone, then with planes too: where look-up wins again, beside planes, its row is replaced."""
    gpu = product.describe(torch.cuda.current_device())
    processors = gpu.processors
    for name in models:
        chain = Chain(name, sorted(bits, reverse=True), 512)
        compile_all(chain_variants(chain, bits, gpu), architecture(gpu))
        for b in sorted(bits):
            table.forget_chain(b, chain.shapes.values())
            for planes in (False, True)[: 2 if b <= launch.PLANES_MAX_BITS else 1]:
                for part, plan, us in best_chain(chain, b, processors, planes=planes):
                    table.add(Case(b, 1, *chain.shapes[part]), plan, us, processors, chain=1)


def chain_variants(chain: Chain, bits: list[int], gpu: product.Gpu) -> Iterator[product.Variant]:
    """Of all launches that :func:`best_chain` may try."""
    norm = torch.empty(0)
    fused = {"qkv": product.Fused(norm), "gate_up": product.Fused(norm, gated=True)}
    for (part, (out_features, in_features)), b in itertools.product(chain.shapes.items(), bits):
        for method in methods(b, 1):
            for plan in every(START, axes(b, method, in_features)[:2]):
                plan = fit(plan, Case(b, 1, out_features, in_features), gpu)
                yield product.Variant.of(plan, b, torch.float16, fused.get(part, product.Fused()), in_features, 1)


def best_chain(chain: Chain, bits: int, processors: int, *, planes: bool) -> list[tuple[str, Launch, float]]:
    """For each product its launch and the time of a block, in microseconds."""
    shapes = chain.shapes
    plans = {part: launch.choose(*shapes[part], bits, 1, processors, planes=planes) for part in shapes}

    def microseconds(part: str, plan: Launch) -> float:
        return statistics.median(chain.times_us(bits, plans | {part: plan}))

    for part in ("gate_up", "down", "qkv", "output"):
        time = functools.partial(microseconds, part)
        candidates = [plans[part]]
        for method in methods(bits, 1):
            if planes or not method.planes:
                choices = axes(bits, method, shapes[part][1])
                descent = Descent(choices, replace(plans[part], alone=False, **choices[0][0]))
                for axis in range(len(choices)):
                    descent.step(axis, time)
                candidates.append(descent.best)
        plans[part] = min(candidates, key=time)
    return [(part, plan, microseconds(part, plan)) for part, plan in plans.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--shapes", nargs="+", help="as 4096x4096; default: those of nested_matmul.py and SmolLM2's")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        help="as planes-2: bit planes, clusters of two; default: all",
    )
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--models", nargs="+", default=["vicuna7b", "mobilellama"])
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
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes or ()]
        products(args.bits, args.rows, shapes or SHAPES + SMALL_SHAPES, args.methods, table)


if __name__ == "__main__":
    main()
