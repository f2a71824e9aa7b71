"""Jobs: what is built, in which order, once, and what a failure or a kill stops; with an engine that is a list."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import dispatch
from pipelines.dispatch import Dispatcher, Job, Phase, jobs_for
from pipelines.engines import needs_of
from pipelines.jobs import Build, ImpossibleError, RefusedError, State
from pipelines.screen import CellView, Screen, duration
from pmpd.artifacts import Node, Store, write_json
from pmpd.config import LauncherConfig, LauncherKind, NeedsConfig

LAUNCHER = LauncherConfig(
    name="local",
    kind=LauncherKind.slurm,
    stages={"big": NeedsConfig(cpus=8, gpus=1, memory_gib=64, minutes=5)},
    retries=1,
)


def node(name: str, stage: str = "big", **inputs: Node) -> Node:
    return Node(stage, 1, {"name": name}, inputs)


def write(n, inputs, out):
    write_json(out / "value.json", n.config["name"])


class ListEngine:
    """Runs a job when it is asked how it is, after what ``fate`` says happens to it: ``ok``, ``killed`` or an error."""

    def __init__(self, store: Store, fate: dict[str, list[str]]) -> None:
        self.store, self.fate, self.started = store, fate, []

    def has_room(self, needs):
        return True

    def submit(self, job: Build, needs):
        self.started.append(job.node.config["name"])
        return ListHandle(self, job)

    def close(self):
        pass


class ListHandle:
    def __init__(self, engine: ListEngine, job: Build) -> None:
        self.engine, self.job, self.asked = engine, job, 0

    def state(self) -> State:
        self.asked += 1
        if self.asked < 3:
            return State.waiting if self.asked < 2 else State.running
        name = self.job.node.config["name"]
        fate = self.engine.fate.get(name, [])
        what = fate.pop(0) if fate else "ok"
        if what == "ok":
            self.engine.store.materialize(self.job.node, write)
        elif what != "killed":
            self.engine.store.path(self.job.node).parent.mkdir(exist_ok=True)
            self.engine.store.note_failure(self.job.node, what)
        return State.ended

    def said(self) -> str:
        return "see its log"

    def cancel(self) -> None:
        self.engine.started.append("cancelled")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(dispatch, "POLL_S", 0.0)
    return Store(tmp_path / "s")


def run(store: Store, targets: list[Node], fate: dict[str, list[str]] | None = None):
    engine = ListEngine(store, dict(fate or {}))
    jobs = jobs_for(targets, store)
    Dispatcher(store, LAUNCHER, engine, lambda n: store.materialize(n, write)).run(jobs)
    return engine, jobs


def test_a_shared_input_is_one_job_and_comes_first(store):
    shared = node("shared")
    engine, jobs = run(store, [node("a", shared=shared), node("b", shared=shared)])
    assert engine.started[0] == "shared"
    assert sorted(engine.started) == ["a", "b", "shared"]
    assert {j.phase for j in jobs.values()} == {Phase.done}


def test_what_is_cached_needs_no_job_nor_what_it_was_made_of(store):
    child = node("child", parent=node("parent"))
    store.materialize(child, write)
    (store.path(child.inputs["parent"]) / "artifact.json").unlink()
    assert jobs_for([child], store) == {}


def test_a_damaged_target_is_built_again(store):
    store.materialize(node("a"), write)
    (store.path(node("a")) / "value.json").write_text("{")
    fresh = Store(store.root)
    engine, _ = run(fresh, [node("a")])
    assert engine.started == ["a"]
    assert Store(store.root).verify(node("a"))


def test_a_stage_that_asks_for_no_job_is_built_here(store):
    engine, _ = run(store, [node("a", cheap=node("c", stage="small"))])
    assert engine.started == ["a"]
    assert store.status(node("c", stage="small")) == "cached"


def test_times_of_this_machine_are_taken_here_when_no_job_runs(store):
    order: list[str] = []
    timing = node("t", stage="latency")
    engine = ListEngine(store, {})
    handles: dict = {}

    def build(n):
        order.append(n.stage)
        assert not dispatcher._handles
        store.materialize(n, write)

    dispatcher = Dispatcher(store, LAUNCHER, engine, build, _handles=handles)
    dispatcher.run(jobs_for([timing, node("a"), node("b")], store))
    assert order == ["latency"]


def test_a_killed_job_is_given_once_more_and_then_fails_with_where_to_look(store):
    engine, jobs = run(store, [node("a"), node("b")], {"a": ["killed"], "b": ["killed", "killed"]})
    assert engine.started.count("a") == engine.started.count("b") == 2
    assert jobs[node("a").key].phase is Phase.done
    assert jobs[node("b").key].error == "killed, 2 times; see its log"
    assert store.failure(node("b")) == "killed, 2 times; see its log"


def test_a_failure_stops_what_hangs_on_it_and_nothing_else(store):
    bad, good = node("bad"), node("good")
    after = node("after", bad=bad, good=good)
    last = node("last", after=after)
    engine, jobs = run(store, [last, good], {"bad": ["ValueError: no"]})
    assert sorted(engine.started) == ["bad", "good"]
    assert jobs[good.key].phase is Phase.done
    assert jobs[last.key].error == f"big {bad.key}: ValueError: no"


def test_without_an_engine_an_error_of_any_type_stops_only_its_own(store):
    def build(n):
        if n.config["name"] == "bad":
            raise KeyError("a bug")
        store.materialize(n, write)

    jobs = jobs_for([node("bad"), node("good")], store)
    Dispatcher(store, LAUNCHER, None, build).run(jobs)
    assert "KeyError" in jobs[node("bad").key].error
    assert jobs[node("good").key].phase is Phase.done


def test_a_job_killed_before_its_turn_is_not_charged_with_an_error_of_an_earlier_run(store):
    store.path(node("a")).parent.mkdir()
    store.note_failure(node("a"), "ValueError: of last week")
    engine, jobs = run(store, [node("a")], {"a": ["killed"]})
    assert engine.started == ["a", "a"]
    assert jobs[node("a").key].phase is Phase.done


class FullEngine(ListEngine):
    """Refuses the first ``refusals`` submissions."""

    def __init__(self, store: Store, refusals: int) -> None:
        super().__init__(store, {})
        self.refusals = refusals

    def submit(self, job, needs):
        if self.refusals > 0:
            self.refusals -= 1
            raise RefusedError("sbatch: job limit reached")
        return super().submit(job, needs)


@pytest.mark.parametrize(("refusals", "done"), [(5, True), (10_000, False)])
def test_a_refused_job_waits_and_is_given_up_only_after_many_refusals(store, monkeypatch, refusals, done):
    monkeypatch.setattr(dispatch, "REFUSED_PAUSE_S", 0.0)
    engine = FullEngine(store, refusals)
    jobs = jobs_for([node("a"), node("b")], store)
    Dispatcher(store, LAUNCHER, engine, lambda n: store.materialize(n, write)).run(jobs)
    assert sorted(engine.started) == (["a", "b"] if done else [])
    assert {j.phase for j in jobs.values()} == {Phase.done if done else Phase.failed}
    assert {j.error for j in jobs.values()} == {"" if done else "refused: sbatch: job limit reached"}
    assert {j.attempts for j in jobs.values()} == {int(done)}


def test_a_job_that_is_never_taken_fails_at_once_and_the_others_go_on(store):
    class Picky(ListEngine):
        def submit(self, job, needs):
            if job.node.config["name"] == "bad":
                raise ImpossibleError("sbatch: Invalid account")
            return super().submit(job, needs)

    bad, good = node("bad"), node("good")
    after = node("after", bad=bad)
    engine = Picky(store, {})
    jobs = jobs_for([after, good], store)
    Dispatcher(store, LAUNCHER, engine, lambda n: store.materialize(n, write)).run(jobs)
    assert engine.started == ["good"]
    assert jobs[bad.key].error == store.failure(bad) == "refused: sbatch: Invalid account"
    assert jobs[after.key].error == f"big {bad.key}: refused: sbatch: Invalid account"
    assert jobs[good.key].phase is Phase.done


def test_a_job_that_waits_in_vain_is_cancelled_and_not_given_again(store):
    class Stuck(ListHandle):
        def state(self):
            return State.stuck if self.job.node.config["name"] == "bad" else super().state()

    class Waits(ListEngine):
        def submit(self, job, needs):
            super().submit(job, needs)
            return Stuck(self, job)

    engine = Waits(store, {})
    jobs = jobs_for([node("bad"), node("good")], store)
    Dispatcher(store, LAUNCHER, engine, lambda n: store.materialize(n, write)).run(jobs)
    assert sorted(engine.started) == ["bad", "cancelled", "good"]
    assert jobs[node("bad").key].error == store.failure(node("bad")) == "never started; see its log"
    assert jobs[node("good").key].phase is Phase.done


def test_an_interrupted_sweep_cancels_its_jobs(store):
    engine = ListEngine(store, {})

    def watch(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher(store, LAUNCHER, engine, write, watch=watch).run(jobs_for([node("a")], store))
    assert engine.started == ["a", "cancelled"]


def test_a_job_asks_for_its_stages_share_and_for_a_gpu_only_on_one():
    on_gpu = Node("big", 1, {"runtime": {"device": "cuda"}})
    on_cpu = Node("big", 1, {"runtime": {"device": "cpu"}})
    assert needs_of(on_gpu, LAUNCHER) == NeedsConfig(cpus=8, gpus=1, memory_gib=64, minutes=5)
    assert needs_of(on_cpu, LAUNCHER).gpus == 0
    assert needs_of(Node("other", 1, {}), LAUNCHER) == NeedsConfig()


def test_the_screen_counts_cells_and_estimates_from_what_stages_took(store):
    shared = node("shared")
    targets = {name: node(name, shared=shared) for name in ("a", "b")}
    jobs = jobs_for(list(targets.values()), store)
    cells = [CellView(n, frozenset({t.key, shared.key})) for n, t in targets.items()] + [CellView("c", frozenset())]
    screen = Screen(cells, jobs, {})
    assert screen.counts() == {"cached": 1, "done": 0, "running": 0, "waiting": 2, "failed": 0}
    assert screen.left() == "", "nothing ever ran"
    first = jobs[shared.key]
    first.phase, first.started, first.ended = Phase.done, 100.0, 130.0
    assert screen.left_s() == (pytest.approx(60), True)
    jobs["new"] = Job(node("new", stage="never"), frozenset())
    assert screen.left() == "over 60 s left"
    del jobs["new"]
    jobs[targets["a"].key].phase = Phase.failed
    assert screen.counts() == {"cached": 1, "done": 0, "running": 1, "waiting": 0, "failed": 1}
    assert screen.line() == "cells: 1 cached, 1 running, 1 failed; jobs 1/3; 30 s left"
    assert [duration(s) for s in (3.2, 300, 7300)] == ["3 s", "5 min", "2 h 2 min"]
