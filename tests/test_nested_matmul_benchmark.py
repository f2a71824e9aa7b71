"""What the benchmark of products says of its rows: peers over ours, several rows over one."""

from __future__ import annotations

import csv
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
def nested_matmul(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("nested_matmul")


@pytest.fixture
def file(nested_matmul: ModuleType, tmp_path: Path) -> Path:
    path = tmp_path / "products.csv"
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, nested_matmul.COLUMNS)
        writer.writeheader()
        writer.writerow({"op": "copy", "provider": "device-to-device", "median": 0.512})  # GB/s
        for provider, bits, m, out_features, in_features, us in TIMES:
            case = {"bits": bits, "m": m, "out_features": out_features, "in_features": in_features}
            writer.writerow({"op": "nested_matmul", "provider": provider, "median": us, **case})
    return path


def test_peers_are_compared_on_the_products_that_both_have(nested_matmul: ModuleType, file: Path) -> None:
    _, times = nested_matmul.read(file)
    assert nested_matmul.over(times, "peer", 2, 1) == [4.0, 1.0]
    assert nested_matmul.over(times, "peer", 2, 2) == [2.0]
    assert nested_matmul.over(times, "peer", 3, 1) == []


def test_sixteen_bits_are_compared_with_every_precision(nested_matmul: ModuleType, file: Path) -> None:
    _, times = nested_matmul.read(file)
    assert nested_matmul.over(times, "cublas-fp16", 2, 1) == [8.0]
    assert nested_matmul.over(times, "cublas-fp16", 3, 1) == [2.0]


def test_the_report_names_rows_and_the_ceiling(
    nested_matmul: ModuleType, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(nested_matmul.PROVIDERS, "peer", nested_matmul.PROVIDERS["any-precision"])
    nested_matmul.report(file)
    said = capsys.readouterr().out
    # 64 x 32 weights of 2 bits are 512 bytes: a microsecond at 0.512 GB/s
    assert "64 x 32: 2.00 us, 50% of the ceiling, M=2 1.50x" in said
    assert "M=1 over peer: geometric mean 2.00x, least 1.00x (2 products)" in said
    assert "M=2 over peer: geometric mean 2.00x, least 2.00x (1 products)" in said
