"""The store when things go wrong: failures, kills, full disks, several processes, a holder that comes back."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pmpd.artifacts import Root, Store, StoreError, write_json, write_tensors
from pmpd.locks import Patience
from tests.test_artifacts import node, write


def test_a_failed_stage_leaves_nothing_that_looks_finished_and_keeps_its_parts(tmp_path):
    store = Store(tmp_path / "s")

    def fail(n, inputs, out):
        write_json(out / "part.json", 1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.materialize(node(), fail)
    assert store.status(node()) == "resumes"

    def resume(n, inputs, out):
        assert (out / "part.json").exists()
        write(n, inputs, out)

    assert sorted(p.name for p in store.materialize(node(), resume).iterdir()) == [
        "artifact.json",
        "part.json",
        "value.json",
    ]


def test_a_removal_that_was_killed_halfway_is_built_again(tmp_path):
    path = Store(tmp_path / "s").materialize(node(), write)
    (path / "artifact.json").unlink()
    assert (Store(tmp_path / "s").materialize(node(), write) / "artifact.json").exists()


def test_temporary_files_of_a_killed_writer_are_not_published(tmp_path):
    store = Store(tmp_path / "s")
    work = tmp_path / "s" / "stage" / f"{node().key}.0.work"
    work.mkdir(parents=True)
    for name in (".tmpA1b2", "x.json.7.tmp"):
        (work / name).write_text("half")
    names = {p.name for p in store.materialize(node(), write).iterdir()}
    assert names == {"artifact.json", "value.json"}


@pytest.mark.parametrize("where", ["stage", "publish"])
def test_a_full_disk_is_said_and_the_next_run_resumes(tmp_path, monkeypatch, where):
    store = Store(tmp_path / "s")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "publish":
            patch.setattr("pmpd.artifacts.fsync", full)
        with pytest.raises(StoreError, match=r"disk .* is full .* run the same command again"):
            store.materialize(node(), full if where == "stage" else lambda n, i, out: (out / "f").write_text("x"))
    assert store.status(node()) == "resumes"
    assert store.materialize(node(), write).exists()


def test_safetensors_own_error_for_a_full_disk_counts_as_one(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    store = Store(tmp_path / "s")
    monkeypatch.setattr("pmpd.files.save_file", full)
    with pytest.raises(StoreError, match="is full"):
        store.materialize(node(), lambda n, i, out: write_tensors(out / "t.safetensors", {"a": torch.zeros(1)}))
    assert store.status(node()) == "resumes"
    monkeypatch.undo()
    store.materialize(node(), lambda n, i, out: write_tensors(out / "t.safetensors", {"a": torch.zeros(1)}))


def _slow_build(root, counter):
    def execute(n, inputs, out):
        with Path(counter).open("a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        write(n, inputs, out)

    Store(Path(root)).materialize(node(), execute)


def test_two_processes_build_once(tmp_path):
    Store(tmp_path / "s")
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_slow_build, args=(str(tmp_path / "s"), str(tmp_path / "count"))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert (tmp_path / "count").read_text() == "built\n"


def _hang(root):
    def execute(n, inputs, out):
        write_json(out / "part.json", 1)
        time.sleep(60)

    Store(Path(root)).materialize(node(), execute)


def test_kill_9_frees_the_lock_and_the_next_run_resumes(tmp_path):
    Store(tmp_path / "s")
    worker = multiprocessing.get_context("spawn").Process(target=_hang, args=(str(tmp_path / "s"),))
    worker.start()
    part = tmp_path / "s" / "stage" / f"{node().key}.0.work" / "part.json"
    deadline = time.monotonic() + 30
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    path = Store(tmp_path / "s").materialize(node(), write)
    assert (path / "part.json").exists()


def test_a_holder_that_comes_back_after_a_take_over_publishes_nothing(tmp_path, monkeypatch):
    """The first process is suspended in its stage, taken for dead and overtaken; then it goes on."""
    patience = Patience(heartbeat_s=0.05, abandoned_after_s=0.2)
    first, second = (Store(tmp_path / "s", patience) for _ in range(2))

    monkeypatch.setattr("pmpd.locks._beat", lambda *_: None)

    def overtaken(n, inputs, out):
        write_json(out / "part.json", "of the first")
        (lock,) = (tmp_path / "s" / "stage").glob("*.0.lock")
        said = json.loads(lock.read_text()) | {"machine": "another boot"}
        lock.write_text(json.dumps(said))
        second.materialize(node(), write)
        write_json(out / "late.json", "of the first")

    with pytest.raises(StoreError, match="taken over"):
        first.materialize(node(), overtaken)
    path = Store(tmp_path / "s").verify(node())
    assert {p.name for p in path.iterdir()} == {"artifact.json", "part.json", "value.json"}


@pytest.mark.parametrize("published", [False, True])
def test_a_holder_overtaken_while_it_waits_for_an_input_leaves_its_successor_alone(tmp_path, published):
    first = Store(tmp_path / "s", Patience(heartbeat_s=60, abandoned_after_s=180))
    second = Store(tmp_path / "s", Patience(heartbeat_s=0.05, abandoned_after_s=0.2))
    building, built_by, failed = threading.Event(), [], []

    def execute_as(name):
        def execute(n, inputs, out):
            built_by.append(name)
            building.set()
            time.sleep(0.3)
            write(n, inputs, out)

        return execute

    def overtake():
        try:
            second.materialize(child, execute_as("second"))
        except Exception as error:
            failed.append(error)

    successor = threading.Thread(target=overtake)

    def locate():
        if not successor.ident:  # the first one's wait, in which its host is suspended
            (lock,) = (tmp_path / "s" / "stage").glob("*.0.lock")
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"machine": "another boot"}))
            successor.start()
            assert building.wait(30)
            if published:
                successor.join(30)
        return tmp_path

    child = node(parent=Root("file", "0", locate))
    path = first.materialize(child, execute_as("first"))
    successor.join(30)
    assert (built_by, failed) == (["second"], [])
    assert Store(tmp_path / "s").verify(child) == path
    assert first.failure(child) is None


def test_the_last_failure_is_kept_until_the_next_attempt(tmp_path):
    store = Store(tmp_path / "s")

    def fail(n, inputs, out):
        raise ValueError("no such thing")

    child = node("child", parent=node("parent"))
    with pytest.raises(ValueError, match="no such thing"):
        store.materialize(child, fail)
    assert store.failure(child) == store.failure(child.inputs["parent"]) == "ValueError: no such thing"
    store.materialize(child, write)
    assert store.failure(child) is None
    assert store.failure(child.inputs["parent"]) is None
