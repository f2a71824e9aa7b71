"""The table of products: what it keeps, and what it says of peers and of several rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TIMES = [  # provider, bits, rows, out, in, us
    ("pmpd", 2, 1, 64, 32, 2.0),
    ("pmpd", 2, 2, 64, 32, 3.0),
    ("pmpd", 2, 1, 32, 32, 1.0),
    ("pmpd", 2, 2, 32, 32, 1.0),
    ("pmpd", 3, 1, 32, 32, 4.0),
    ("peer", 2, 1, 64, 32, 8.0),
    ("peer", 2, 1, 32, 32, 1.0),
    ("peer", 2, 2, 64, 32, 6.0),
    ("cublas-fp16", 16, 1, 32, 32, 8.0),
]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("products")


@pytest.fixture
def file(products: ModuleType, tmp_path: Path) -> Path:
    table = products.Table(tmp_path / "products.csv")
    table.put({"op": "copy", "provider": "device-to-device", "median": 0.512})  # GB/s
    for provider, bits, m, out_features, in_features, us in TIMES:
        case = products.Case(bits, m, out_features, in_features)
        table.put({"op": "nested_matmul", "provider": provider, "median": us} | vars(case))
    return table.path


def test_a_time_put_again_takes_the_place_of_the_old_and_all_others_stay(products: ModuleType, file: Path) -> None:
    _, before = products.read(file)
    case = products.Case(2, 1, 64, 32)
    products.Table(file).put({"op": "nested_matmul", "provider": "peer", "median": 5.0} | vars(case))
    _, after = products.read(file)
    assert after == before | {("peer", case): 5.0}
    assert list(after) == list(before)
    products.Table(file).put({"op": "copy", "provider": "device-to-device", "median": 1.0})
    assert products.read(file) == (1e9, after)


def test_peers_are_compared_on_the_products_that_both_have(products: ModuleType, file: Path) -> None:
    _, times = products.read(file)
    assert products.over(times, "peer", 2, 1) == [4.0, 1.0]
    assert products.over(times, "peer", 2, 2) == [2.0]
    assert products.over(times, "peer", 3, 1) == []


def test_sixteen_bits_are_compared_with_every_precision(products: ModuleType, file: Path) -> None:
    _, times = products.read(file)
    assert products.over(times, "cublas-fp16", 2, 1) == [8.0]
    assert products.over(times, "cublas-fp16", 3, 1) == [2.0]


def test_the_report_names_rows_and_the_ceiling(
    products: ModuleType, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    products.report(file)
    said = capsys.readouterr().out
    # 64 x 32 weights of 2 bits are 512 bytes: a microsecond at 0.512 GB/s
    assert "64 x 32: 2.00 us, 50% of the ceiling, M=2 1.50x" in said
    assert "M=1 over peer: geometric mean 2.00x, least 1.00x (2 products)" in said
    assert "M=2 over peer: geometric mean 2.00x, least 2.00x (1 products)" in said


def test_runs_of_a_commit_are_kept_and_those_of_another_go(products: ModuleType, tmp_path: Path) -> None:
    run, runs = tmp_path / "run.csv", tmp_path / "runs.csv"
    case = products.Case(2, 1, 64, 32)
    for commit, us in (("a", 1.0), ("b", 2.0), ("b", 4.0)):
        run.unlink(missing_ok=True)
        table = products.Table(run)
        table.put({"op": "copy", "provider": "device-to-device", "median": 1.0, "commit": commit})
        for provider in ("pmpd", "peer"):
            row = {"op": "nested_matmul", "provider": provider, "median": us, "commit": commit}
            table.put(row | vars(case))
        products.append_run(run, runs)
    assert products.read_runs(runs) == ("b", {case: [2.0, 4.0]})
    assert [line.split(",")[0] for line in runs.read_text(encoding="utf-8").split()] == ["run", "1", "2"]
