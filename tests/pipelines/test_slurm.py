"""What Slurm says, and does not say, of jobs: with a squeue and an sbatch of our own, and no cluster."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from pipelines import slurm
from pipelines.jobs import State


class FakeSqueue:
    """A queue whose clock and whose squeue's words (None: it does not answer) a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.words = 1000.0, ""
        monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(slurm.subprocess, "run", self._run)
        self.queue = slurm.Queue()

    def _run(self, command: list[str], **_: object) -> SimpleNamespace:
        if self.words is None:
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout=self.words)

    def after(self, seconds: float, words: str | None) -> State:
        self.now_s, self.words = self.now_s + seconds, words
        return self.queue.state("7")


def test_a_job_is_not_ended_because_squeue_is_away(monkeypatch):
    squeue = FakeSqueue(monkeypatch)
    squeue.after(3, "6 RUNNING")
    squeue.queue.add("7")
    assert [squeue.after(60, None) for _ in range(5)] == [State.waiting] * 5
    assert squeue.after(3, "7 RUNNING") is State.running
    assert squeue.after(600, None) is State.running
    assert squeue.after(3, "6 RUNNING") is State.ended


def test_a_job_that_is_too_new_to_be_listed_waits_and_one_that_is_never_listed_has_ended(monkeypatch):
    squeue = FakeSqueue(monkeypatch)
    squeue.queue.add("7")
    assert squeue.after(3, "") is State.waiting
    assert squeue.after(60, "") is State.ended
