"""Products whose times are measured, the table of them, and what it says: peers over ours, several rows over one.

Knows no provider's kernel and needs no GPU.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmpd.files import atomic

RESULTS = Path(__file__).parent / "results" / "nested_matmul.csv"
KEY = ("op", "provider", "bits", "m", "out_features", "in_features")
COLUMNS = (*KEY, "unit", "median", "p20", "p80", "gpu", "versions", "commit")
RUNS = RESULTS.with_name("nested_matmul_runs.csv")
"""Of ours alone, run after run of one commit: how far a product's time differs from one run to the next."""
SHAPES = [
    *((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096), (22016, 4096), (2048, 2048), (5632, 2048)),
    *((8192, 2048), (6912, 2560), (2048, 5632), (2048, 8192), (2560, 6912)),
]
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    bits: int
    m: int
    out_features: int
    in_features: int

    @property
    def weight_bytes(self) -> float:
        return self.out_features * self.in_features * self.bits / 8


def cases(shapes: Iterable[tuple[int, int]], bits: Iterable[int], rows: Iterable[int]) -> Iterator[Case]:
    for out_features, in_features in shapes:
        for b in bits:
            for m in rows:
                if m == 1 or b <= 4 or b == 16:
                    yield Case(b, m, out_features, in_features)


def shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of ``4096x11008``."""
    out_features, in_features = text.split("x")
    return int(out_features), int(in_features)


def write_rows(path: Path, columns: Collection[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file, whole or as it was."""
    with atomic(path) as whole, whole.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Table:
    """A CSV file with a row a provider and product, whole after each that is put; rows not put again stay."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
        if path.exists():
            with path.open(encoding="utf-8") as stream:
                self.rows = {tuple(row[k] for k in KEY): row for row in csv.DictReader(stream)}

    def put(self, row: Mapping[str, Any]) -> None:
        self.rows[tuple(str(row.get(k, "")) for k in KEY)] = row
        write_rows(self.path, COLUMNS, self.rows.values())


def append_run(run: Path, runs: Path) -> None:
    """Our products of the file ``run`` as one more run in ``runs``; runs of another commit than this one's go."""
    with run.open(encoding="utf-8") as stream:
        new = [row for row in csv.DictReader(stream) if row["provider"] == "pmpd"]
    kept: list[dict[str, Any]] = []
    if runs.exists():
        with runs.open(encoding="utf-8") as stream:
            kept = [row for row in csv.DictReader(stream) if row["commit"] == new[0]["commit"]]
    number = 1 + max((int(row["run"]) for row in kept), default=0)
    write_rows(runs, ("run", *COLUMNS), [*kept, *({"run": number} | row for row in new)])


def read_runs(path: Path) -> tuple[str, dict[Case, list[float]]]:
    """The commit, and of each product the medians in microseconds, run by run."""
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    times: dict[Case, list[float]] = {}
    for row in rows:
        case = Case(*(int(row[key]) for key in ("bits", "m", "out_features", "in_features")))
        times.setdefault(case, []).append(float(row["median"]))
    return rows[0]["commit"], times


def read(path: Path) -> tuple[float, dict[tuple[str, Case], float]]:
    """The ceiling, bytes a second, and medians in microseconds by provider and case."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    ceiling = next(float(row["median"]) for row in rows if row["op"] == "copy") * 1e9
    keys = ("bits", "m", "out_features", "in_features")
    return ceiling, {
        (row["provider"], Case(*(int(row[key]) for key in keys))): float(row["median"])
        for row in rows
        if row["op"] != "copy"
    }


def over(times: dict[tuple[str, Case], float], provider: str, bits: int, m: int) -> list[float]:
    """``provider``'s times over ours, by product that both have; 16 bits are compared with ours at every precision."""
    own_bits = 16 if provider == "cublas-fp16" else bits
    return [
        times[provider, replace(case, bits=own_bits)] / us
        for (name, case), us in times.items()
        if (name, case.bits, case.m) == ("pmpd", bits, m) and (provider, replace(case, bits=own_bits)) in times
    ]


def report(path: Path) -> None:
    """By product: one row's time, its share of the ceiling, several rows over one. By peer: its times over ours."""
    ceiling, times = read(path)
    ours = {case: us for (provider, case), us in times.items() if provider == "pmpd"}
    for bits in sorted({case.bits for case in ours}):
        print(f"\n{bits} bits")
        for case, us in ours.items():
            if (case.bits, case.m) == (bits, 1):
                share = 1e6 * case.weight_bytes / us / ceiling
                line = f"{case.out_features} x {case.in_features}: {us:.2f} us, {share:.0%} of the ceiling"
                several = {m: ours[replace(case, m=m)] for m in ROWS if replace(case, m=m) in ours}
                print(line + "".join(f", M={m} {t / us:.2f}x" for m, t in several.items() if m > 1))
        for m, provider in itertools.product(ROWS, dict.fromkeys(name for name, _ in times)):
            if provider != "pmpd" and (values := over(times, provider, bits, m)):
                mean, least = statistics.geometric_mean(values), min(values)
                print(f"M={m} over {provider}: geometric mean {mean:.2f}x, least {least:.2f}x ({len(values)} products)")


def draw(path: Path) -> None:
    import matplotlib.pyplot as plt

    ceiling, times = read(path)
    with path.open() as file:
        gpu = next(csv.DictReader(file))["gpu"]
    figure, axes = plt.subplots(figsize=(7, 5))
    largest = 0.0
    for provider in dict.fromkeys(name for name, _ in times):
        points = sorted(
            (case.weight_bytes / 1e6, us) for (name, case), us in times.items() if (name, case.m) == (provider, 1)
        )
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, label=provider)
            largest = max(largest, points[-1][0])
    line = [1.0, largest]
    axes.plot(line, [1e12 * megabytes / ceiling for megabytes in line], "k--", label=f"{ceiling / 1e12:.2f} TB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes of weights, MB", ylabel="time, microseconds")
    axes.set_title(f"One row of x, {gpu}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)
