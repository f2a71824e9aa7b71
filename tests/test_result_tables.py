"""Tables that a page shows are those of the CSV files beside it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quantisers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_quantisers", ROOT / "benchmarks" / "plot_quantisers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
