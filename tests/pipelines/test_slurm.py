"""What Slurm says, and does not say, of jobs: with a squeue and an sbatch of our own, and no cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import slurm
from pipelines.jobs import Build, RefusedError, State
from pmpd.artifacts import Node
from pmpd.config import LauncherConfig, LauncherKind, NeedsConfig


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


def test_what_sbatch_refuses_is_said_to_be_refused(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit: pip install 'pmpd[slurm]'")
    for command, line in (("srun", "exit 0"), ("sbatch", "echo QOSMaxSubmitJobPerUserLimit >&2; exit 1")):
        (tmp_path / command).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = LauncherConfig(name="slurm", kind=LauncherKind.slurm, folder=str(tmp_path / "jobs"))
    job = Build(Node("big", 1, {}), str(tmp_path / "s"), str(Path.cwd()), 1)
    with pytest.raises(RefusedError, match="QOSMaxSubmitJobPerUserLimit"):
        slurm.Slurm(config).submit(job, NeedsConfig())
