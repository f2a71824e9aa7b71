"""What Slurm says, and does not say, of jobs: with a squeue, an sbatch and an scontrol of our own, and no cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import slurm, squeue
from pipelines.jobs import Build, ImpossibleError, RefusedError, State
from pmpd.artifacts import Node
from pmpd.config import ConfigError, LauncherConfig, LauncherKind, NeedsConfig


class FakeSqueue:
    """A queue whose clock and whose squeue's words (None: it does not answer) a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.words = 1000.0, ""
        monkeypatch.setattr(squeue, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(squeue.subprocess, "run", self._run)
        self.queue = squeue.Queue()

    def _run(self, command: list[str], **_: object) -> SimpleNamespace:
        if self.words is None:
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout=self.words)

    def after(self, seconds: float, words: str | None) -> State:
        self.now_s, self.words = self.now_s + seconds, words
        return self.queue.state("7")


def test_a_job_is_not_ended_because_squeue_is_away(monkeypatch):
    fake = FakeSqueue(monkeypatch)
    fake.after(3, "6 RUNNING None")
    fake.queue.add("7")
    assert [fake.after(60, None) for _ in range(5)] == [State.waiting] * 5
    assert fake.after(3, "7 RUNNING None") is State.running
    assert fake.after(600, None) is State.running
    assert fake.after(3, "6 RUNNING None") is State.ended


def test_a_job_that_is_too_new_to_be_listed_waits_and_one_that_is_never_listed_has_ended(monkeypatch):
    fake = FakeSqueue(monkeypatch)
    fake.queue.add("7")
    assert fake.after(3, "") is State.waiting
    assert fake.after(60, "") is State.ended


def test_a_reason_that_stands_until_somebody_acts_is_said_once_and_ends_the_wait(monkeypatch, caplog):
    fake = FakeSqueue(monkeypatch)
    fake.queue.add("7")
    assert fake.after(3, "7 PENDING PartitionTimeLimit") is State.waiting
    assert fake.after(300, None) is State.waiting
    assert fake.after(290, "7 PENDING PartitionTimeLimit") is State.waiting
    assert caplog.text.count("job 7 waits: PartitionTimeLimit") == 1
    assert fake.after(11, "7 PENDING PartitionTimeLimit") is State.stuck
    assert fake.queue.reason("7") == "PartitionTimeLimit"


def test_a_reason_that_was_mended_meanwhile_counts_from_anew(monkeypatch):
    fake = FakeSqueue(monkeypatch)
    fake.queue.add("7")
    fake.after(3, "7 PENDING PartitionTimeLimit")
    assert fake.after(590, "7 PENDING Resources") is State.waiting
    assert fake.after(60, "7 PENDING PartitionTimeLimit") is State.waiting
    assert fake.after(60, "7 RUNNING None") is State.running


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Priority", False),
        ("Resources", False),
        ("AssocMaxJobsLimit", True),
        ("QOSMaxCpuPerUserLimit", True),
        ("ReqNodeNotAvail, UnavailableNodes:n1", True),
        ("JobHeldUser", True),
    ],
)
def test_what_may_pass_is_waited_for_and_said_where_it_is_not_the_queue_alone(monkeypatch, caplog, reason, said):
    fake = FakeSqueue(monkeypatch)
    fake.queue.add("7")
    assert [fake.after(3600, f"7 PENDING {reason}") for _ in range(50)] == [State.waiting] * 50
    assert caplog.text.count(f"waits: {reason}") == int(said)


@pytest.mark.parametrize(
    "reason",
    ["AssocMaxWallDurationPerJobLimit", "QOSMaxMemoryPerNode", "QOSMinGRES", "BadConstraints", "PartitionConfig"],
)
def test_limits_on_a_job_alone_do_not_pass(monkeypatch, reason):
    fake = FakeSqueue(monkeypatch)
    fake.queue.add("7")
    fake.after(3, f"7 PENDING {reason}")
    assert fake.after(600, f"7 PENDING {reason}") is State.stuck


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


def submit(folder: Path) -> None:
    job = Build(Node("big", 1, {}), str(folder / "s"), str(Path.cwd()), 1)
    engine(folder).submit(job, NeedsConfig(cpus=3, memory_gib=5))


FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    "words",
    [
        FAILED + "Unable to contact slurm controller (connect failure)",
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Unexpected message received",
        FAILED + "Unable to create job record, try again",
        FAILED + "Required partition not available (inactive or drain)",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
        + FAILED
        + "Job violates accounting/QOS policy (job submit limit)",
        "sbatch: error: Invalid user for SlurmUser slurm, ignored\nsbatch: fatal: Unable to process configuration file",
        "",
    ],
)
def test_what_may_be_taken_later_is_refused_for_now(tmp_path, commands, words):
    commands(srun="exit 0", scontrol=UP, sbatch=f"echo '{words}' >&2; exit 1")
    with pytest.raises(RefusedError) as error:
        submit(tmp_path)
    assert all(line.rpartition(": ")[2] in str(error.value) for line in words.splitlines())


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (FAILED + "Invalid account or account/partition combination specified", 1),
        (FAILED + "Invalid partition name specified", 1),
        (FAILED + "Requested node configuration is not available", 1),
        ("sbatch: error: Memory specification can not be satisfied\n" + FAILED + "Requested node ...", 1),
        (FAILED + "Requested time limit is invalid (missing or exceeds some limit)", 1),
        (
            "sbatch: error: AssocMaxCpuPerJobLimit\n"
            + FAILED
            + "Job violates accounting/QOS policy (job submit limit)",
            1,
        ),
        (FAILED + "Access/permission denied", 1),
        ('sbatch: error: Invalid numeric value "-3" for --cpus-per-task.', 1),
        ('sbatch: unrecognized option --foo=1\nTry "sbatch --help" for more information', 255),
    ],
)
def test_what_will_never_be_taken_is_said_with_what_was_asked_for(tmp_path, commands, words, code):
    commands(srun="exit 0", scontrol=UP, sbatch=f"echo '{words}' >&2; exit {code}")
    with pytest.raises(ImpossibleError) as error:
        submit(tmp_path)
    said = str(error.value)
    assert words.splitlines()[0].removeprefix(FAILED).removeprefix("sbatch: ").removeprefix("error: ") in said
    assert "cpus=3 gpus=0 memory_gib=5" in said
    assert "launcher.stages.big" in said
    assert "--help" not in said


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
