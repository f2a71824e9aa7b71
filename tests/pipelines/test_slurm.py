"""What Slurm says, and does not say, of jobs: with a squeue, an sbatch and an scontrol of our own, and no cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import slurm
from pipelines.jobs import Build, RefusedError, State
from pmpd.artifacts import Node
from pmpd.config import ConfigError, LauncherConfig, LauncherKind, NeedsConfig


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


UP = "echo 'Slurmctld(primary) at head is UP'"
DOWN = "echo 'Slurmctld(primary) at head is DOWN'; exit 1"


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Callable[..., None]:
    """Puts commands of Slurm's names on the PATH, each a line of sh: there is no other Slurm on it."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(**lines: str) -> None:
        for command, line in lines.items():
            (tmp_path / command).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / command).chmod(0o755)

    return put


def engine(folder: Path, partition: str | None = None) -> slurm.Slurm:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'pmpd[slurm]'")
    config = LauncherConfig(name="slurm", kind=LauncherKind.slurm, folder=str(folder / "jobs"), partition=partition)
    return slurm.Slurm(config)


def test_what_sbatch_refuses_is_said_to_be_refused(tmp_path, commands):
    commands(srun="exit 0", scontrol=UP, sbatch="echo QOSMaxSubmitJobPerUserLimit >&2; exit 1")
    job = Build(Node("big", 1, {}), str(tmp_path / "s"), str(Path.cwd()), 1)
    with pytest.raises(RefusedError, match="QOSMaxSubmitJobPerUserLimit"):
        engine(tmp_path).submit(job, NeedsConfig())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (DOWN, r"head is DOWN.*SLURM_CONF.*launcher=local"),
        ("echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1", "configuration source"),
        ("echo 'Slurmctld(primary) at head is DOWN'", "head is DOWN"),  # releases whose exit code is 0
        ("echo 'cannot stat file' >&2; exec sleep 60", "cannot stat file; no end in 1 s"),
    ],
)
def test_a_controller_that_does_not_answer_is_refused_before_anything_is_submitted(
    tmp_path, commands, monkeypatch, answer, words
):
    (tmp_path / "sleep").symlink_to(str(shutil.which("sleep", path="/bin:/usr/bin")))
    monkeypatch.setattr(slurm, "PING_TIMEOUT_S", 1)
    commands(srun="exit 0", scontrol=answer, sbatch="exit 1")
    with pytest.raises(ConfigError, match=words):
        engine(tmp_path)


def test_a_backup_controller_that_answers_is_enough(tmp_path, commands):
    commands(srun="exit 0", scontrol=f"{DOWN.partition(';')[0]}; echo 'Slurmctld(backup) at other is UP'")
    engine(tmp_path)


def test_no_scontrol_is_said(tmp_path, commands):
    commands(srun="exit 0")
    with pytest.raises(ConfigError, match="there is no scontrol here"):
        engine(tmp_path)


def test_a_partition_that_the_controller_does_not_know_is_refused(tmp_path, commands):
    known = '[ "$4" = gpu ] && exit 0; echo "Partition $4 not found" >&2; exit 1'
    commands(srun="exit 0", scontrol=f'[ "$1" = ping ] && {{ {UP}; exit 0; }}; {known}')
    engine(tmp_path, "gpu")
    with pytest.raises(ConfigError, match=r"launcher.partition=gpu,gqu is not possible: Partition gqu not found"):
        engine(tmp_path, "gpu,gqu")
