"""Tables that a page shows are those of the CSV files beside it."""

from __future__ import annotations

import csv
import importlib
import itertools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str) -> ModuleType:
    """A script's module, which finds those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def quantisers() -> ModuleType:
    return benchmark("plot_quantisers")


def test_the_quantisers_page_shows_the_tables_of_its_results(quantisers: ModuleType) -> None:
    page = quantisers.PAGE.read_text(encoding="utf-8")
    tables = quantisers.tables_of(quantisers.RESULTS)
    assert set(re.findall(r"<!-- table ([a-z0-9-]+) -->", page)) == set(tables)
    assert quantisers.filled(page, tables) == page


def test_marked_tables_are_replaced_and_all_else_stays(quantisers: ModuleType) -> None:
    page = "before\n<!-- table a -->\n<!-- end -->\nbetween\n<!-- table b -->\n| old |\n<!-- end -->\nafter\n"
    once = quantisers.filled(page, {"a": "| one |", "b": "| two |"})
    assert once == (
        "before\n<!-- table a -->\n| one |\n<!-- end -->\nbetween\n<!-- table b -->\n| two |\n<!-- end -->\nafter\n"
    )
    assert quantisers.filled(once, {"a": "| one |", "b": "| two |"}) == once


MODELS = {
    "Vicuna-7B": "vicuna7b",
    "MobileLLaMA-1.4B": "mobilellama",
    "Llama-3.1-8B": "llama3_1_8b",
    "Qwen2-1.5B": "qwen2_1_5b",
}
DECODED = {
    "README.md": ("hf-fp16-compiled 16", "cublas-fp16 16", "pmpd 4", "pmpd 3", "pmpd 2"),
    "docs/decoding.md": ("pmpd 4", "pmpd 3", "pmpd 2", "cublas-fp16 16", "hf-fp16-graph 16", "hf-fp16-compiled 16"),
}
"""Columns of each page's table of tokens a second: provider and bits; a dash where it was not timed."""


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def microseconds() -> Callable[..., float]:
    """Of a product, by provider, bits, rows of x, outputs and inputs."""
    found = {
        (row["provider"], row["bits"], row["m"], row["out_features"], row["in_features"]): float(row["median"])
        for row in rows_of("nested_matmul.csv")
    }
    return lambda *product: found[tuple(map(str, product))]


def test_the_kernels_page_shows_the_tables_of_its_results() -> None:
    tables = benchmark("product_tables")
    page = tables.PAGE.read_text(encoding="utf-8")
    written = tables.tables_of(tables.RESULTS)
    assert set(re.findall(r"<!-- table ([a-z0-9-]+) -->", page)) == set(written)
    assert tables.filled(page, written) == page


def test_the_kernels_page_shows_the_times_of_its_results(microseconds: Callable[..., float]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    copied = next(float(row["median"]) for row in rows_of("nested_matmul.csv") if row["op"] == "copy")
    lines = re.findall(r"^\| (\d+) x (\d+) \| (.* \| .* \| .*) \|$", page, re.MULTILINE)
    assert len(lines) == 12
    for out_features, in_features, cells in lines:
        for bits, cell in zip((2, 3, 4), cells.split(" | "), strict=True):
            own, peer = (microseconds(name, bits, 1, out_features, in_features) for name in ("pmpd", "any-precision"))
            share = int(out_features) * int(in_features) * bits / 8e3 / own / copied
            assert cell == f"{own:.2f} ({peer / own:.2f}x, {share:.0%})"


def test_the_kernels_page_shows_what_several_rows_cost(microseconds: Callable[..., float]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    products = {(row["out_features"], row["in_features"]) for row in rows_of("nested_matmul.csv") if row["bits"]}
    for bits in (2, 3, 4):
        for peer, words in (("", "times M = 1"), ("any-precision", "over any-precision")):
            [line] = re.findall(rf"^\| {bits} bits,? {words}: geometric mean; \w+ \| (.*) \|$", page, re.MULTILINE)
            for m, cell in zip((2, 4, 8), line.split(" | "), strict=True):
                if peer:
                    ratios = [microseconds(peer, bits, m, *p) / microseconds("pmpd", bits, m, *p) for p in products]
                    extreme = min(ratios)
                else:
                    ratios = [microseconds("pmpd", bits, m, *p) / microseconds("pmpd", bits, 1, *p) for p in products]
                    extreme = max(ratios)
                assert cell == f"{statistics.geometric_mean(ratios):.2f}x; {extreme:.2f}x"


def test_the_kernels_page_says_how_far_the_targets_were_reached(microseconds: Callable[..., float]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    products = sorted(
        {(row["out_features"], row["in_features"]) for row in rows_of("nested_matmul.csv") if row["bits"]}
    )
    copied = next(float(row["median"]) for row in rows_of("nested_matmul.csv") if row["op"] == "copy")

    def over(peer: str, bits: int) -> list[float]:
        return [microseconds(peer, bits, 1, *p) / microseconds("pmpd", bits, 1, *p) for p in products]

    for name, peer, tail in (
        ("any-precision", "any-precision", "{slower} slower (least {least:.2f}x)"),
        ("AnyBCQ", "anybcq", "no shape below {least:.2f}x"),
    ):
        ratios = [over(peer, bits) for bits in (2, 3, 4)]
        means, every = (f"{statistics.geometric_mean(r):.2f}x" for r in ratios), sorted(itertools.chain(*ratios))
        tail = tail.format(least=every[0], slower=sum(ratio < 1 for ratio in every) or "none")
        [reached] = re.findall(rf"^\| {name}: 1\.\d.* \| (.*) \|$", page, re.MULTILINE)
        assert reached == f"{', '.join(means)}; {tail}"
    shares = [
        f"{out_features * 4096 * bits / 8e3 / microseconds('pmpd', bits, 1, out_features, 4096) / copied:.0%}"
        for bits in (3, 4, 2)
        for out_features in (22016, 12288)
    ]
    [reached] = re.findall(r"^\| 65 % of the ceiling .* \| (.*) \|$", page, re.MULTILINE)
    assert reached == "{} and {}, {} and {}; {} and {}".format(*shares)
    rows = {
        m: [
            microseconds("pmpd", bits, m, *p) / microseconds("pmpd", bits, 1, *p)
            for bits in (2, 3, 4)
            for p in products
        ]
        for m in (2, 4, 8)
    }
    means = (f"{statistics.geometric_mean(ratios):.2f}x" for ratios in rows.values())
    above = [sum(ratio > limit for ratio in rows[m]) for m, limit in ((2, 1.2), (4, 1.5), (8, 2.2))]
    worst = (f"{max(ratios):.2f}x" for ratios in rows.values())
    [reached] = re.findall(r"^\| M = 2, 4, 8 at most .* \| (.*) \|$", page, re.MULTILINE)
    mean_only = "**in the mean only**: " if any(above) else ""
    counts = f"{above[0]}, {above[1]} and {above[2]}" if any(above) else "none"
    assert reached.startswith(f"{mean_only}{', '.join(means)}; {counts} of 36 products are over")
    assert reached.endswith(f"at worst {', '.join(worst)}")


def test_the_kernels_page_says_how_many_products_are_over_in_each_run() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    times = {
        (row["run"], row["bits"], row["out_features"], row["in_features"], row["m"]): float(row["median"])
        for row in rows_of("nested_matmul_runs.csv")
    }
    runs = sorted({run for run, *_ in times}, key=int)
    products = {(bits, *shape) for _, bits, *shape, _ in times if bits in {"2", "3", "4"}}
    [counts] = re.findall(r"^\| over the limit, run by run \| (.*) \|$", page, re.MULTILINE)
    [medians] = re.findall(r"^\| over it by the medians of the runs; worst \| (.*) \|$", page, re.MULTILINE)
    several = zip(("2", "4", "8"), (1.2, 1.5, 2.2), counts.split(" | "), medians.split(" | "), strict=True)
    every = 0
    for m, limit, count, median in several:
        over = [sum(times[run, *p, m] > limit * times[run, *p, "1"] for p in products) for run in runs]
        assert count == ", ".join(map(str, over))
        every += sum(over)
        middle = {(p, n): statistics.median(times[run, *p, n] for run in runs) for p in products for n in (m, "1")}
        ratios = [middle[p, m] / middle[p, "1"] for p in products]
        assert median == f"{sum(ratio > limit for ratio in ratios) or 'none'}; {max(ratios):.2f}x"
    assert f"Of their {3 * len(products) * len(runs)} ratios {every} are over" in " ".join(page.split())


@pytest.mark.parametrize("page", DECODED)
def test_tokens_a_second_are_those_of_the_results(page: str) -> None:
    steps = {
        (row["model"], f"{row['provider']} {row['bits']}"): float(row["median"])
        for row in rows_of("decode.csv")
        if row["op"] == "step"
    }
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = dict(re.findall(r"^\| ([\w.-]+) \| ([\d |-]+) \|$", text, re.MULTILINE))
    for name, model in MODELS.items():
        timed = [steps.get((model, column)) for column in DECODED[page]]
        assert lines[name].split(" | ") == [f"{1e6 / us:.0f}" if us else "-" for us in timed]
