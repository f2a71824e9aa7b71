"""What a second run builds: nothing that is there, whatever asks for it; what was killed or damaged goes on."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.plan import MissingSearchError, Planner
from pmpd.artifacts import Store
from pmpd.stages import execute
from pmpd.tasks import TASKS
from tests.pipelines.cells import cell, overrides, run

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_second_run_builds_nothing(store, tiny_llama, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tiny_llama, store, tmp_path / "again", "scheduler=learned")
    assert "done in" not in caplog.text
    assert "cached" in caplog.text
    again = (tmp_path / "again" / "results.csv").read_text()
    assert again == (store.parent / "learned" / "results.csv").read_text()


def test_explicit_precisions_and_those_of_the_search_share_artifacts(store, tiny_llama):
    def planned(*more: str) -> Planner:
        lines = [o for o in overrides(tiny_llama, store, "scheduler=high") if "_bits" not in o]
        return Planner(cell(*lines, *more), Store(store))

    found = planned().precisions()
    assert found.source == "search"
    given = planned(f"model.high_bits={found.high}", f"model.low_bits={found.low}")
    assert given.precisions().source == "given"
    assert planned().cell().evaluation.key == given.cell().evaluation.key


def test_precisions_that_hang_on_a_search_that_has_not_run_are_said_so(tiny_llama, tmp_path):
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=high") if "_bits" not in o]
    with pytest.raises(MissingSearchError, match="search has not run"):
        Planner(cell(*lines), Store(tmp_path / "store")).cell()


def test_a_damaged_search_is_built_again(store, tiny_llama, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=high") if "_bits" not in o]
    copy = Store(tmp_path / "store")
    planner = Planner(cell(*lines), copy)
    expected = planner.precisions()
    os.truncate(copy.path(planner.search) / "summary.json", 9)
    planner = Planner(cell(*lines), Store(copy.root))
    with pytest.raises(MissingSearchError, match=r"damaged.*summary\.json"):
        planner.cell()
    planner.store.materialize(planner.search, execute)
    assert planner.precisions() == expected


def test_changing_a_metric_or_a_tolerance_decodes_nothing(store, tiny_llama):
    base = Planner(cell(*overrides(tiny_llama, store, "scheduler=static")), Store(store)).cell()
    other = Planner(
        cell(
            *overrides(tiny_llama, store, "scheduler=static", "scheduler.tolerance=5", "budget.bootstrap_resamples=99")
        ),
        Store(store),
    ).cell()

    def decoding(c):
        return {n.key for n in c.evaluation.ancestors() if n.stage == "rollouts"}

    assert base.evaluation.key != other.evaluation.key
    assert decoding(base) == decoding(other)


def test_two_models_do_not_share_and_two_schedulers_do(store, tiny_llama):
    def nested(*more: str) -> str:
        return Planner(cell(*overrides(tiny_llama, store, *more)), Store(store)).nested.key

    assert nested("scheduler=high") == nested("scheduler=learned")
    assert nested("quantizer.parent_bits=6") != nested()


RULES = """
from pmpd.records import Sample

class Mine:
    columns = ("text",)

    def samples(self, rows, **how):
        return [Sample(f"{k}", (row["text"],)) for k, row in enumerate(rows)]
"""


def test_a_task_of_ones_own_that_was_edited_is_asked_again(store, tiny_llama, tmp_path, monkeypatch):
    file, rows = tmp_path / "mine.py", tmp_path / "data" / "mine" / "test.jsonl"
    file.write_text(RULES)
    rows.parent.mkdir(parents=True)
    rows.write_text('{"text": "Why?"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(TASKS, "mine", importlib.import_module("mine").Mine())
    lines = overrides(tiny_llama, store, "scheduler=high", "task.dataset=mine")
    lines = [line for line in lines if line != "data=samples"]

    def keys() -> set[str]:
        planned = Planner(cell(*lines, f"data.root={tmp_path / 'data'}", "data.text_root=samples"), Store(store)).cell()
        return {n.key for n in planned.evaluation.ancestors() if n.stage in ("prompts", "rollouts", "evaluate")}

    first = keys()
    assert keys() == first
    file.write_text(RULES.replace("{k}", "row {k}"))
    assert not keys() & first


def test_no_text_of_a_shipped_task_is_in_a_key(store, tiny_llama):
    planned = Planner(cell(*overrides(tiny_llama, store, "scheduler=high")), Store(store)).cell()
    [prompts] = {n.key: n for n in planned.evaluation.ancestors() if n.stage == "prompts"}.values()
    assert prompts.inputs.keys() == {"model", "data"}


def identical(one: Path, two: Path) -> int:
    """Compare the digests of every artifact that both stores hold, times apart; returns how many there were."""
    count = 0
    for manifest in one.glob("*/*/artifact.json"):
        other = two / manifest.relative_to(one)
        if other.exists() and manifest.parts[-3] != "latency":
            assert json.loads(manifest.read_text())["files"] == json.loads(other.read_text())["files"], manifest
            count += 1
    return count


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_a_stage_goes_on_and_ends_bit_identical(tiny_llama, tmp_path, store, how):
    lines = overrides(tiny_llama, tmp_path / "store", "scheduler=high", f"hydra.run.dir={tmp_path / 'out'}")
    command = [sys.executable, "pipelines/run.py", *lines]
    victim = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A job that a shell started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not (begun := list((tmp_path / "store").glob("quantize/*.work"))) and victim.poll() is None:
        assert time.monotonic() < deadline, "too slow to be killed in a stage"
        time.sleep(0.005)
    assert begun, "finished before it could be killed"
    os.kill(victim.pid, how)
    said, _ = victim.communicate(timeout=60)
    killed = time.time()
    if how is signal.SIGINT:
        assert victim.returncode == 130
        assert "interrupted" in said
        assert "Traceback" not in said
    assert not list((tmp_path / "store").glob("evaluate/*/artifact.json"))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [texts] = [p for p in (tmp_path / "store").glob("sensitivity/*/artifact.json") if p.stat().st_mtime < killed]
    assert f"sensitivity {texts.parent.name} cached" in " ".join(done.stdout.split())
    assert identical(tmp_path / "store", store) >= 8
    page = (tmp_path / "out" / "index.html").read_text()
    assert "python pipelines/run.py model=hf" in page
    assert list((tmp_path / "out").glob("table_1_*.tex"))
