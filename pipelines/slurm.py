"""Jobs on Slurm, through submitit. What is waiting, running or gone is read from squeue, so no accounting is needed."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from typing import Any

from pipelines.jobs import Build, Handle, RefusedError, State
from pmpd.config import ConfigError, LauncherConfig, NeedsConfig

log = logging.getLogger(__name__)

GRACE_S = 90
"""Slurm's warning before a time limit or a preemption."""
PING_TIMEOUT_S = 15.0
"""A controller that is down is told in 0.02 s, munged that is down in 2 s, a SLURM_CONF that is not there in 60."""
SQUEUE_EVERY_S = 2.0
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""Slurm's words for a job that has not ended; every other one is an end."""


class Submitted:
    """A job of submitit's. Its result is not asked for: Slurm's accounting, which that may need, is often off."""

    def __init__(self, job: Any, queue: Queue) -> None:
        self.job = job
        self.queue = queue

    def state(self) -> State:
        done = self.job.paths.result_pickle.exists()
        return State.ended if done else self.queue.state(self.job.job_id)

    def said(self) -> str:
        return f"what it printed: {self.job.paths.stderr}"

    def cancel(self) -> None:
        self.job.cancel(check=False)


class Queue:
    """What squeue says of this user's jobs, asked once every few seconds for all of them."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._asked = 0.0
        self._answered = 0.0  # when the question was asked whose answer is known
        self._submitted: dict[str, float] = {}

    def add(self, job_id: str) -> None:
        self._submitted[job_id] = time.monotonic()

    def state(self, job_id: str) -> State:
        """A job that is not listed has ended, unless squeue's last answer is from before it could be listed."""
        now = time.monotonic()
        if now - self._asked > SQUEUE_EVERY_S:
            self._asked = now
            if self._ask():
                self._answered = now
        word = self._words.get(job_id)
        if word is None:
            listed_from = self._submitted.get(job_id, 0.0) + 5 * SQUEUE_EVERY_S
            return State.ended if self._answered >= listed_from else State.waiting
        if word in WAITING:
            return State.waiting
        return State.running if word in RUNNING else State.ended

    def _ask(self) -> bool:
        """Whether squeue answered."""
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:  # a controller that is away for a moment
            log.warning("squeue does not answer (%s); asked again", error)
            return False
        self._words = dict(line.split() for line in asked.stdout.splitlines() if line.strip())
        return True


def check_cluster(partition: str | None) -> None:
    """Ask the controller whether it is there and knows ``partition``: sbatch would be refused again and again.

    A controller that goes away later is waited for, which is why jobs that it refuses are given to it again.

    Raises:
        ConfigError: no controller answers, or it has no such partition.
    """
    code, said = _scontrol("ping")
    if code or not re.search(r"\bUP\b", said):  # a line each for primary and backups; one that is up is enough
        raise ConfigError(
            f"launcher=slurm is not possible: no Slurm controller answers ({said}); start slurmctld and munged, or set "
            "SLURM_CONF to the configuration of a cluster that runs; launcher=local needs none"
        )
    for name in partition.split(",") if partition else ():
        code, said = _scontrol("--all", "show", "partition", name)
        if code:
            raise ConfigError(
                f"launcher.partition={partition} is not possible: {said}; `sinfo --summarize` lists them, null is the "
                "cluster's default"
            )


def _scontrol(*arguments: str) -> tuple[int, str]:
    """Exit code of scontrol, and what it said, in one line."""
    try:
        asked = subprocess.run(["scontrol", *arguments], capture_output=True, timeout=PING_TIMEOUT_S)
        code, said = asked.returncode, asked.stdout + asked.stderr
    except FileNotFoundError:
        return 127, "there is no scontrol here"
    except subprocess.TimeoutExpired as error:
        code, said = 124, (error.stdout or b"") + (error.stderr or b"") + f"no end in {PING_TIMEOUT_S:g} s".encode()
    lines = said.decode(errors="replace").splitlines()
    return code, "; ".join(line.strip() for line in lines if line.strip() and not line.startswith("**"))


class Slurm:
    """Batch jobs. What is cancelled or killed is seen in squeue, so that no accounting is needed.

    Raises:
        ConfigError: submitit is not installed, this machine has no sbatch, no controller answers, or it has no such
            partition.
    """

    def __init__(self, config: LauncherConfig) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("launcher=slurm needs submitit: pip install 'pmpd[slurm]'") from error
        if submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError("launcher=slurm is not possible: there is no sbatch here; launcher=local needs none")
        check_cluster(config.partition)
        self.executor = submitit.SlurmExecutor(folder=f"{config.folder}/%j", max_num_timeout=100)
        self.config = config
        self.queue = Queue()

    def has_room(self, needs: NeedsConfig) -> bool:
        return True

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        parameters: dict[str, Any] = {
            "job_name": job.name,
            "cpus_per_task": needs.cpus,
            "mem": f"{max(1, round(1024 * needs.memory_gib))}M",
            "time": needs.minutes,
            "signal_delay_s": GRACE_S,
            "additional_parameters": {"requeue": True, **self.config.options},
        }
        if needs.gpus:
            parameters["gpus_per_node"] = needs.gpus
        if self.config.partition is not None:
            parameters["partition"] = self.config.partition
        self.executor.update_parameters(**parameters)
        from submitit.core.utils import FailedJobError

        try:
            submitted = self.executor.submit(job)
        except FailedJobError as error:
            raise RefusedError(f"sbatch: {error}") from error
        self.queue.add(submitted.job_id)
        return Submitted(submitted, self.queue)

    def close(self) -> None:
        pass
