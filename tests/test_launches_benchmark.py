"""The search for launches, with made-up times in place of a GPU's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

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
        return distance(plan, best)

    descent = launches.Descent(
        launches.Case(2, 1, 4096, 11008), choices, launches.replace(launches.START, **choices[0][0])
    )
    for _ in range(3):
        for axis in range(len(choices)):
            descent.step(axis, time)
    assert descent.times[descent.best] == min(map(time, launches.every(launches.START, choices)))
    assert len(descent.times) == len(set(timed[: len(descent.times)]))
    assert (descent.best.planes, descent.best.cluster) == (method.planes, method.cluster)


def distance(plan: Launch, best: Launch) -> float:
    """A time that is shortest for ``best``."""
    names = ("splits", "teams", "stages", "early", "late", "alone")
    return 1 + float(sum(abs(getattr(plan, n) - getattr(best, n)) for n in names))


@pytest.mark.parametrize("name", ["lookup-1", "lookup-2", "planes-1", "planes-2"])
@pytest.mark.parametrize("shape", [(4096, 11008), (2048, 2048)])
def test_a_search_finds_the_fastest_launch_that_fits_and_compiles_for_all_that_it_tries(
    launches: ModuleType, name: str, shape: tuple[int, int]
) -> None:
    gpu, case = launches.product.Gpu((9, 0), 132, 227 * 1024), launches.Case(2, 2, *shape)
    (method,) = (m for m in launches.methods(2, 2) if m.name == name)
    search = launches.Search(case, method, gpu)
    small = shape[0] <= 16 * gpu.processors
    everything = search.plans(search.divisions, launches.QUEUES, [False, True] if small else [False])
    best = sorted(everything, key=repr)[len(everything) // 3]
    timed: list[tuple[Launch, int]] = []

    def time(plan: Launch, replays: int) -> float:
        timed.append((plan, replays))
        return distance(plan, best)

    assert search.run(time) == best
    quick = [plan for plan, replays in timed if replays == launches.FEW_REPLAYS]
    assert len(quick) == len(set(quick))
    assert {(plan.planes, plan.cluster) for plan in quick} == {(method.planes, method.cluster)}
    fitted = [launches.fit(plan, case, gpu) for plan in quick]
    assert all(plan.shared_bytes(2, *shape, 1) <= gpu.shared_bytes for plan in fitted)
    assert {launches.variant(plan, case) for plan in fitted} <= search.variants()


def test_of_several_rows_a_block_of_a_cluster_has_memory_for_its_own_columns_alone() -> None:
    columns, tiles = 2 * 2 * (22 * 256 + 16), 4096 // 16 // 66 + 1
    plan = Launch(22, 1, 2, 2, cluster=2, blocks=132, rows=2)
    ring, partial, tables = 11 * 2 * 1024, 2 * 22 * 2 * 16 * 4, tiles * 16 * (8 + 8)
    assert plan.shared_bytes(2, 4096, 11008, 1) == ring + columns + partial + tables


def test_a_chain_is_compiled_for_what_its_descents_try(launches: ModuleType) -> None:
    shapes = {"qkv": (12288, 4096), "output": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
    gpu = launches.product.Gpu((9, 0), 132, 227 * 1024)
    variants = set(launches.chain_variants(SimpleNamespace(shapes=shapes), [2], gpu))
    assert {(v.norm, v.gated) for v in variants} == {(True, False), (True, True), (False, False)}
    assert {v.cluster for v in variants} == {1, 2}
    assert {v.stages for v in variants} <= {stages for stages, _ in launches.QUEUES}
