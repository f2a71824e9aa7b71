"""The search for launches, with made-up times in place of a GPU's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pmpd.kernels import launch
from pmpd.kernels.launch import Launch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("launches")


@pytest.mark.parametrize("name", ["lookup-1", "planes-1", "planes-2"])
def test_a_descent_finds_the_best_of_separate_choices_and_times_none_twice(launches: ModuleType, name: str) -> None:
    (method,) = (m for m in launches.methods(2, 1) if m.name == name)
    choices = launches.axes(2, 1, method, 4096, 11008, 132)
    best = launches.replace(launches.START, **choices[0][-1], **choices[1][3], late=False)
    timed: list[Launch] = []

    def time(plan: Launch) -> float:
        timed.append(plan)
        names = ("splits", "teams", "stages", "early", "late")
        return float(sum(abs(getattr(plan, n) - getattr(best, n)) for n in names))

    descent = launches.Descent(
        launches.Case(2, 1, 4096, 11008), choices, launches.replace(launches.START, **choices[0][0])
    )
    for _ in range(3):
        for axis in range(launches.AXES):
            descent.step(axis, time)
    assert descent.times[descent.best] == min(map(time, launches.every(launches.START, choices)))
    assert len(descent.times) == len(set(timed[: len(descent.times)]))
    assert (descent.best.planes, descent.best.cluster) == (method.planes, method.cluster)


def test_what_the_table_has_is_where_refining_begins(launches: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "launches.csv"
    file.write_bytes(launches.RESULTS.read_bytes())
    table = launches.Table(file, {})
    measured = [m for m in launch.measured() if not m.chain and (m.bits, m.rows, m.steps) == (2, 2, 43)]
    found = [table.launch(launches.Case(2, 2, 4096, 11008), method) for method in launches.methods(2, 2)]
    assert sorted(map(repr, found)) == sorted(repr(m.launch) for m in measured)
    assert table.launch(launches.Case(2, 2, 4096, 11009), launches.methods(2, 2)[0]) is None


def test_a_chain_is_compiled_for_what_its_descents_try(launches: ModuleType) -> None:
    shapes = {"qkv": (12288, 4096), "output": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
    gpu = launches.product.Gpu((9, 0), 132, 227 * 1024)
    variants = set(launches.chain_variants(SimpleNamespace(shapes=shapes), [2], gpu))
    assert {(v.norm, v.gated) for v in variants} == {(True, False), (True, True), (False, False)}
    assert {v.cluster for v in variants} == {1, 2}
    assert {v.stages for v in variants} <= {stages for stages, _ in launches.QUEUES}
