"""What launches of the GPU kernels there are to choose from, and the file of the best: for launches.py.

Knows no time. Programs are compiled by all cores.
"""

from __future__ import annotations

import csv
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from products import Case, write_rows

from pmpd.kernels import launch, nvrtc, product
from pmpd.kernels.launch import Launch

RESULTS = Path(launch.__file__).parent / "launches.csv"
COLUMNS = [
    *("chain", "bits", "m", "out_features", "in_features", "processors", "planes", "cluster"),
    *("splits", "teams", "stages", "early", "hold", "late", "alone", "median", "gpu", "versions", "commit"),
]
QUEUES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 4), (6, 4), (8, 4)]
"""Stages, and of these early."""
TIMES = [(2, 0), (0, 0), (0, 500), (1, 0), (3, 0)]
"""When the next kernel may come, ``Launch.late``, and how long this one waits with its weights, ``Launch.hold``: not
longer, as after another kind of kernel that is lost (``docs/kernels.md``)."""
EVERY_QUEUE = sorted({*QUEUES, *((n, early or 1) for n in range(1, 9) for early in (n, n - 1, n // 2))})
EVERY_TIME = [*TIMES, (0, 250)]
"""What a thorough search tries."""
START = Launch(4, 2, 3, 2)
"""Which choices change."""


@dataclass(frozen=True)
class Method:
    planes: bool
    cluster: int

    @property
    def name(self) -> str:
        return f"{'planes' if self.planes else 'lookup'}-{self.cluster}"


def methods(bits: int, rows: int) -> list[Method]:
    if rows == 1 and bits <= launch.PLANES_MAX_BITS:
        return [Method(False, 1), Method(True, 1), Method(True, 2)]
    return [Method(False, 1), Method(False, 2)]


Changes = list[dict[str, Any]]
"""Of a launch: choices of one kind."""


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


def queues(pairs: Iterable[tuple[int, int]]) -> Changes:
    return [{"stages": stages, "early": early} for stages, early in pairs]


def times(pairs: Iterable[tuple[int, int]]) -> Changes:
    return [{"late": late, "hold": hold} for late, hold in pairs]


def every(start: Launch, choices: list[Changes]) -> Iterator[Launch]:
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

    def known(self, case: Case, method: Method) -> Launch | None:
        """The launch of a product by itself."""
        sizes = (case.bits, case.m, case.out_features, case.in_features)
        row = self.rows.get((0, *sizes, int(method.planes), method.cluster))
        return launch.parse(row).launch if row else None

    def forget_chain(self, bits: int, shapes: Collection[tuple[int, int]]) -> None:
        """Launches that did well beside others than those that come now."""
        gone = {(1, bits, 1, *shape) for shape in shapes}
        self.rows = {key: row for key, row in self.rows.items() if key[:5] not in gone}

    def add(self, case: Case, plan: Launch, us: float, processors: int, chain: int = 0) -> None:
        row = self.record | {
            **{"chain": chain, "bits": case.bits, "m": case.m, "processors": processors, "median": f"{us:.3f}"},
            **{"out_features": case.out_features, "in_features": case.in_features},
            **{key: str(int(getattr(plan, key))) for key in COLUMNS[6:15]},
        }
        self.rows[_key(row)] = row
        sys.stdout.write(f"{case} chain {chain}: {us:.2f} us {plan}\n")
        sys.stdout.flush()
        write_rows(self.path, COLUMNS, (self.rows[key] for key in sorted(self.rows)))


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    """What a row is about."""
    names = ("chain", "bits", "m", "out_features", "in_features", "planes", "cluster")
    return tuple(int(row[name]) for name in names)


def fit(plan: Launch, case: Case, gpu: product.Gpu) -> Launch:
    sizes = (case.bits, case.out_features, case.in_features)
    return launch.fit(plan, *sizes, 1, case.m, gpu.processors, gpu.shared_bytes)
