"""The search for launches, with made-up times in place of a GPU's."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pmpd.kernels.launch import Launch
from pmpd.kernels.product import Gpu

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GPU = Gpu((9, 0), 132, 227 * 1024)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("launches")


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("launch_chains")


@pytest.mark.parametrize("name", ["lookup-1", "planes-1", "planes-2"])
def test_a_descent_finds_the_best_of_separate_choices_and_times_none_twice(chains: ModuleType, name: str) -> None:
    (method,) = (m for m in chains.methods(2, 1) if m.name == name)
    choices = chains.axes(2, method, 11008)
    best = replace(chains.START, **choices[0][-1], **choices[1][3], late=3)
    timed: list[Launch] = []

    def time(plan: Launch) -> float:
        timed.append(plan)
        return distance(plan, best)

    descent = chains.Descent(choices, replace(chains.START, **choices[0][0]))
    for _ in range(3):
        for axis in range(len(choices)):
            descent.step(axis, time)
    assert descent.times[descent.best] == min(map(time, chains.every(chains.START, choices)))
    assert len(descent.times) == len(set(timed[: len(descent.times)]))
    assert (descent.best.planes, descent.best.cluster) == (method.planes, method.cluster)


def distance(plan: Launch, best: Launch) -> float:
    """A time that is shortest for ``best``."""
    names = ("splits", "teams", "stages", "early", "hold", "late", "alone")
    return 1 + float(sum(abs(getattr(plan, n) - getattr(best, n)) for n in names))


@pytest.mark.parametrize(
    ("name", "rows", "shape"),
    [
        *((name, 8, (4096, 11008)) for name in ("lookup-1", "lookup-2")),
        *((name, 1, (4096, 11008)) for name in ("planes-1", "planes-2")),
        *((name, 2, (2048, 2048)) for name in ("lookup-1", "lookup-2")),
        *((name, 1, (2048, 2048)) for name in ("planes-1", "planes-2")),
    ],
)
def test_a_search_finds_the_fastest_launch_that_fits_and_compiles_for_all_that_it_tries(
    launches: ModuleType, name: str, rows: int, shape: tuple[int, int]
) -> None:
    case = launches.Case(2, rows, *shape)
    (method,) = (m for m in launches.methods(2, rows) if m.name == name)
    search = launches.Search(case, method, GPU)
    small = shape[0] <= 16 * GPU.processors
    rare = [queue for queue in launches.QUEUES if queue not in launches.FEW_QUEUES]
    possible = sorted(search.plans(search.divisions, rare, [(3, 0)], [small]), key=repr)
    best = possible[len(possible) // 3]
    quick: list[Launch] = []

    def time(plan: Launch, replays: int) -> float:
        if replays == launches.REPLAYS:
            return distance(plan, best)
        quick.append(plan)
        return distance(plan, best) + 0.5

    assert search.run(time) == best
    assert search.times[best] == distance(best, best), "of the longer measurement"
    assert len(quick) == len(set(quick))
    assert {(plan.planes, plan.cluster) for plan in quick} == {(method.planes, method.cluster)}
    fitted = [launches.fit(plan, case, GPU) for plan in quick]
    assert [replace(plan, blocks=0) for plan in fitted] == [replace(plan, rows=rows) for plan in quick]
    assert {launches.variant(plan, case) for plan in fitted} <= search.variants()


def test_a_search_takes_the_launch_that_the_table_has_unless_another_is_faster(
    launches: ModuleType, tmp_path: Path
) -> None:
    case, method = launches.Case(2, 1, 4096, 11008), launches.Method(True, 1)
    table = launches.Table(tmp_path / "launches.csv", {"gpu": "", "versions": "", "commit": ""})
    assert table.known(case, method) is None
    known = replace(launches.START, planes=True, splits=8, teams=1, stages=8, early=4)
    table.add(case, known, 5.0, GPU.processors)
    table = launches.Table(tmp_path / "launches.csv", {})
    assert table.known(case, method) == known
    assert table.known(replace(case, m=2), method) is None
    search = launches.Search(case, method, GPU, known)

    def slow_with_few_stages(plan: Launch, _: int) -> float:
        return 1.0 if (plan.splits, plan.teams, plan.stages) == (8, 1, 8) else 2.0 + plan.splits / 100

    found = search.run(slow_with_few_stages)
    assert found is not None
    assert (found.splits, found.teams, found.stages) == (8, 1, 8)
    assert launches.Search(case, method, GPU).run(slow_with_few_stages) != found
    quick = launches.Search(case, method, GPU, known, same_division=True)
    assert quick.run(slow_with_few_stages) == found
    assert {(plan.splits, plan.teams) for plan in quick.times} == {(8, 1)}
    assert {(plan.late, plan.hold) for plan in quick.times} == set(launches.TIMES)
    thorough = launches.Search(case, method, GPU, known, same_division=True, thorough=True)
    assert thorough.run(slow_with_few_stages) == found
    assert {(plan.late, plan.hold) for plan in thorough.times} == set(launches.EVERY_TIME) > set(launches.TIMES)
    assert quick.times.keys() < thorough.times.keys()
    faster = launches.Search(case, method, GPU, known).run(lambda plan, _: float(plan.splits))
    assert faster is not None
    assert faster.splits == 1


def test_a_launch_that_has_no_memory_for_spread_tables_is_tried_without(launches: ModuleType) -> None:
    case = launches.Case(8, 8, 22016, 4096)
    search = launches.Search(case, launches.Method(False, 1), GPU)
    search.run(lambda plan, replays: plan.teams + plan.stages)
    assert {launches.fit(plan, case, GPU).spread for plan in search.times} == {False, True}


def test_a_search_among_launches_of_which_none_fits_finds_none(launches: ModuleType) -> None:
    case, method = launches.Case(2, 8, 4096, 28672), launches.Method(False, 1)
    assert launches.Search(case, method, GPU).run(lambda plan, replays: 1.0) is None


def test_a_chain_is_compiled_for_what_its_descents_try(chains: ModuleType) -> None:
    shapes = {"qkv": (12288, 4096), "output": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
    variants = set(chains.chain_variants(SimpleNamespace(shapes=shapes, own=list(shapes)), [2], GPU))
    assert {(v.norm, v.gated) for v in variants} == {(True, False), (True, True), (False, False)}
    assert {v.cluster for v in variants} == {1, 2}
    assert {v.stages for v in variants} <= {stages for stages, _ in chains.QUEUES}


@pytest.mark.usefixtures("chains")
def test_a_shape_is_the_first_models_that_has_it() -> None:
    chain = importlib.import_module("chain")
    assert chain.products("qwen2_1_5b") == {
        **{"gate_up": (17920, 1536), "down": (1536, 8960)},
        **{"qkv": (2048, 1536), "output": (1536, 1536)},
    }
    assert chain.own_products("vicuna7b") == ["gate_up", "down", "qkv", "output"]
    assert chain.products("llama3_1_8b")["output"] == chain.products("vicuna7b")["output"] == (4096, 4096)
    assert chain.own_products("llama3_1_8b") == ["gate_up", "down", "qkv"]
