"""The lock: one holder whatever happens, nobody waits for the dead, on one machine and between several.

Another host is a holder whose file says so: its process number means nothing here, only its heartbeat counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from pmpd import locks
from pmpd.locks import Patience, hold, holder

FAST = Patience(heartbeat_s=0.05, abandoned_after_s=0.4)
SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")


def never() -> bool:
    return False


def elsewhere(path: Path, pid: int = 1) -> None:
    """A lock that a process of another host holds, or held."""
    path.write_text(json.dumps({"host": "other", "machine": "another boot", "pid": pid, "started": "1"}))


def test_a_released_lock_is_taken_at_once_in_the_next_generation(tmp_path):
    for expected in range(3):
        with hold(tmp_path, "k", never) as generation:
            assert generation == expected
            found = holder(tmp_path, "k")
            assert found is not None
            assert found["pid"] == os.getpid()
        assert holder(tmp_path, "k") is None


def test_who_waits_gives_up_when_it_is_settled(tmp_path):
    elsewhere(tmp_path / "k.0.lock")
    looks = iter([False, False, True])
    with hold(tmp_path, "k", lambda: next(looks)) as generation:
        assert generation is None


def test_a_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    child = FORK.Process(target=os._exit, args=(0,))
    child.start()
    child.join()
    said = {"host": "here", "machine": locks.machine(), "pid": child.pid, "started": "1"}
    (tmp_path / "k.4.lock").write_text(json.dumps(said))
    assert holder(tmp_path, "k") is None
    started = time.monotonic()
    with hold(tmp_path, "k", never) as generation:
        assert generation == 5
    assert time.monotonic() - started < locks.ABANDONED_AFTER_S / 10


def test_a_process_number_that_was_given_anew_is_not_the_holder(tmp_path):
    said = {"host": "here", "machine": locks.machine(), "pid": os.getppid(), "started": "an earlier one"}
    (tmp_path / "k.0.lock").write_text(json.dumps(said))
    with hold(tmp_path, "k", never) as generation:
        assert generation == 1


def test_a_silent_lock_of_another_host_is_taken_over_and_a_beating_one_is_not(tmp_path):
    path = tmp_path / "k.0.lock"
    elsewhere(path, pid=os.getpid())
    deadline = time.monotonic() + 4 * FAST.abandoned_after_s
    beats: list[float] = []

    def beat() -> bool:
        if time.monotonic() < deadline:
            beats.append(time.monotonic())  # before the touch: a starved machine may pause between the two
            path.touch()
        return False

    with hold(tmp_path, "k", beat, FAST) as generation:
        assert generation == 1
    assert time.monotonic() - beats[-1] >= FAST.abandoned_after_s * 0.9
    assert len(beats) > 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_file_that_says_nothing_is_believed_for_as_long_as_another_hosts(tmp_path, content):
    (tmp_path / "k.0.lock").write_text(content)
    with hold(tmp_path, "k", never, FAST) as generation:
        assert generation == 1


def test_a_clock_that_is_wrong_by_years_changes_nothing(tmp_path):
    path = tmp_path / "k.0.lock"
    elsewhere(path)
    for when in (0, time.time() + 1e8):
        os.utime(path, (when, when))
        started = time.monotonic()
        with hold(tmp_path, f"k{when:.0f}"[:1], never, FAST):
            assert time.monotonic() - started >= FAST.abandoned_after_s * 0.9
        for file in tmp_path.glob("k.[1-9].lock"):
            file.unlink()


def _critical(folder: str, turns: int, seed: int) -> None:
    """Enter ``turns`` times; note every entry and every exit; die of kill -9 inside once in four entries."""
    random.seed(seed)
    for _ in range(turns):
        with hold(Path(folder), "k", never, FAST) as generation, Path(folder, "log").open("a") as log:
            log.write(f"in {os.getpid()} {generation}\n")
            log.flush()
            time.sleep(random.uniform(0, 0.01))
            if random.random() < 0.25:
                os.kill(os.getpid(), signal.SIGKILL)
            log.write(f"out {os.getpid()} {generation}\n")
            log.flush()


@pytest.mark.parametrize("seed", range(3))
def test_many_processes_that_are_killed_at_random_are_never_inside_together(tmp_path, seed):
    workers = [FORK.Process(target=_critical, args=(str(tmp_path), 8, 100 * seed + i)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode in (0, -signal.SIGKILL)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    generations = [int(g) for what, _, g in lines if what == "in"]
    assert generations == list(range(len(generations)))
    inside: str | None = None
    for what, pid, _ in lines:
        if what == "in":
            inside = pid  # whoever was inside before left, or was killed: its exit cannot follow
        else:
            assert inside == pid
            inside = None
    assert sum(w.exitcode != 0 for w in workers) > 0, "nobody was killed: the seeds test nothing"


def test_a_holder_on_a_full_disk_still_lets_go(tmp_path, monkeypatch):
    with hold(tmp_path, "k", never):
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.undo()
    with hold(tmp_path, "k", never) as generation:
        assert generation == 0


def test_patience_shorter_than_two_heartbeats_is_refused():
    with pytest.raises(ValueError, match=r"abandoned_after_s=1\.0 .* twice heartbeat_s"):
        Patience(heartbeat_s=1.0, abandoned_after_s=1.0)
