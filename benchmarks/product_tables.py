"""The tables of docs/kernels.md, from what nested_matmul.py wrote. It needs no GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pages import filled
from products import RESULTS, RUNS, SHAPES, Case, over, read, read_runs

PAGE = RESULTS.parents[2] / "docs" / "kernels.md"
BITS = (2, 3, 4)
SEVERAL = {2: 1.2, 4: 1.5, 8: 2.2}
"""Rows of x, and what they may cost at most, in times of one row."""
PEERS = {
    "any-precision": "any-precision: geometric mean; least",
    "anybcq": "AnyBCQ",
    "cublas-fp16": "cuBLAS fp16",
    "torch-int4": "PyTorch's int4 (tinygemm)",
    "torchao": "torchao 0.18 int4, group 128",
    "gemlite": "gemlite 0.6.0, group 128",
    "humming": "humming-kernels 0.1.19, symmetric integers",
}


class Times:
    """What the file says, in microseconds."""

    def __init__(self, path: Path) -> None:
        self.ceiling, self.times = read(path)

    def own(self, case: Case) -> float:
        return self.times["pmpd", case]

    def share(self, case: Case) -> str:
        """Of the ceiling."""
        return f"{1e6 * case.weight_bytes / self.own(case) / self.ceiling:.0%}"

    def over(self, peer: str, bits: int, m: int = 1) -> list[float]:
        return over(self.times, peer, bits, m)

    def several(self, bits: Iterable[int], m: int) -> list[float]:
        """Times of so many rows over those of one, product by product."""
        cases = [Case(b, 1, *sizes) for b in bits for sizes in SHAPES]
        return [self.own(replace(case, m=m)) / self.own(case) for case in cases]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def mean_and(extreme: float, ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}x; {extreme:.2f}x"


def least(ratios: list[float]) -> str:
    return mean_and(min(ratios), ratios) if ratios else ""


def one_row(times: Times) -> str:
    lines = head("out x in", *(f"{bits} bits" for bits in BITS))
    for sizes in SHAPES:
        cells = []
        for case in (Case(bits, 1, *sizes) for bits in BITS):
            own, peer = times.own(case), times.times["any-precision", case]
            cells.append(f"{own:.2f} ({peer / own:.2f}x, {times.share(case)})")
        lines.append(line("{} x {}".format(*sizes), *cells))
    for peer, name in PEERS.items():
        lines.append(line(f"over {name}", *(least(times.over(peer, bits)) for bits in BITS)))
    return "\n".join(lines)


def several_rows(times: Times) -> str:
    lines = head("several rows of x", *map(str, SEVERAL))
    for bits in BITS:
        ratios = [times.several([bits], m) for m in SEVERAL]
        lines.append(line(f"{bits} bits, times M = 1: geometric mean; worst", *(mean_and(max(r), r) for r in ratios)))
    for peer, name, which in (
        ("any-precision", "any-precision: geometric mean; least", BITS),
        ("torch-int4", "PyTorch's int4", (4,)),
        ("cublas-fp16", "cuBLAS fp16", BITS),
    ):
        for bits in which:
            lines.append(line(f"{bits} bits over {name}", *(least(times.over(peer, bits, m)) for m in SEVERAL)))
    return "\n".join(lines)


def runs(path: Path) -> str:
    """How many products of several rows are over their limit in each run, and by the median of the runs."""
    commit, times = read_runs(path)
    number = max(map(len, times.values()))
    medians = {case: statistics.median(each) for case, each in times.items()}
    counts, worst = [], []
    for m, limit in SEVERAL.items():
        pairs = [(Case(bits, m, *sizes), Case(bits, 1, *sizes)) for bits in BITS for sizes in SHAPES]
        ratios = [[a / b for a, b in zip(times[case], times[one], strict=True)] for case, one in pairs]
        counts.append(", ".join(str(sum(each[run] > limit for each in ratios)) for run in range(number)))
        of_medians = [medians[case] / medians[one] for case, one in pairs]
        worst.append(f"{sum(ratio > limit for ratio in of_medians) or 'none'}; {max(of_medians):.2f}x")
    return "\n".join(
        [
            *head(f"{number} runs at {commit}, {len(BITS) * len(SHAPES)} products each", *map(str, SEVERAL)),
            line("over the limit, run by run", *counts),
            line("over it by the medians of the runs; worst", *worst),
        ]
    )


def targets(times: Times) -> str:
    means_over, least_over = {}, {}
    for peer in ("any-precision", "anybcq"):
        ratios = [times.over(peer, bits) for bits in BITS]
        means_over[peer] = ", ".join(f"{statistics.geometric_mean(r):.2f}x" for r in ratios)
        least_over[peer] = f"{min(map(min, ratios)):.2f}x"
    slower = sum(ratio < 1 for bits in BITS for ratio in times.over("any-precision", bits)) or "none"
    shares = [times.share(Case(bits, 1, out_features, 4096)) for bits in (3, 4, 2) for out_features in (22016, 12288)]
    rows = {m: times.several(BITS, m) for m in SEVERAL}
    means = ", ".join(f"{statistics.geometric_mean(r):.2f}x" for r in rows.values())
    worst = ", ".join(f"{max(r):.2f}x" for r in rows.values())
    above = [sum(ratio > SEVERAL[m] for ratio in ratios) for m, ratios in rows.items()]
    mean_only = "**in the mean only**: " if any(above) else ""
    counts = f"{above[0]}, {above[1]} and {above[2]}" if any(above) else "none"
    too_slow = f"{counts} of {len(rows[2])} products are over"
    reached = f"{mean_only}{means}; {too_slow}, at worst {worst}"
    return "\n".join(
        [
            *head("target", "reached"),
            line(
                "any-precision: 1.8x at 2 bits, 1.6x at 3, 1.35x at 4; none slower",
                f"{means_over['any-precision']}; {slower} slower (least {least_over['any-precision']})",
            ),
            line(
                "AnyBCQ: 1.3x at each, geometric mean", f"{means_over['anybcq']}; no shape below {least_over['anybcq']}"
            ),
            line(
                "65 % of the ceiling at 3 and 4 bits on 22016 x 4096 and 12288 x 4096; 50 % at 2",
                "{} and {}, {} and {}; {} and {}".format(*shares),
            ),
            line("M = 2, 4, 8 at most 1.2x, 1.5x, 2.2x of M = 1", reached),
        ]
    )


def tables_of(path: Path) -> dict[str, str]:
    """Those of the page, by name."""
    times = Times(path)
    tables = {"one-row": one_row(times), "several-rows": several_rows(times), "targets": targets(times)}
    return tables | {"runs": runs(RUNS)}


def write_page(path: Path) -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables_of(path)), encoding="utf-8")
