"""Jobs on Slurm, through submitit: what is asked for, and what a refusal means.

How jobs that were taken fare is the queue's to say (``pipelines/squeue.py``).
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

from pipelines.jobs import Build, Handle, ImpossibleError, RefusedError, State
from pipelines.squeue import Queue
from pmpd.config import ConfigError, LauncherConfig, NeedsConfig

GRACE_S = 90
"""Slurm's warning before a time limit or a preemption."""
PING_TIMEOUT_S = 15.0
"""A controller that is down is told in 0.02 s, munged that is down in 2 s, a SLURM_CONF that is not there in 60."""
BAD_OPTIONS = 255
"""sbatch's exit code for options that it cannot read; what the controller refuses is 1."""
FINAL = re.compile(
    r"Invalid (?!user|authentication|job credential)|Access(/permission)? denied|No partition specified"
    r"|Requested (node configuration|time limit|nodes not in|reservation is invalid)|More processors requested"
    r"|(Node|Task|CPU) count specification invalid|Memory (required by task|specification)|Time limit specification"
    r"|User's group not permitted|Duplicate generic resource|(?!\w*Submit)(Assoc|QOS|Max)\w+$"
)
"""How refusals begin that are about the request itself: Slurm's table of errors, and an account's limits by their
names, but for those on how many jobs may be submitted. Every other one, known (no controller, too many jobs) or not,
may pass: an overloaded Slurm says all kinds of things."""


class Submitted:
    """A job of submitit's. Its result is not asked for: Slurm's accounting, which that may need, is often off."""

    def __init__(self, job: Any, queue: Queue, asked: str) -> None:
        self.job = job
        self.queue = queue
        self.asked = asked

    def state(self) -> State:
        done = self.job.paths.result_pickle.exists()
        return State.ended if done else self.queue.state(self.job.job_id)

    def said(self) -> str:
        reason = self.queue.reason(self.job.job_id)
        return f"Slurm: {reason} ({self.asked})" if reason else f"what it printed: {self.job.paths.stderr}"

    def cancel(self) -> None:
        self.job.cancel(check=False)


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

        asked = (
            f"asked for cpus={needs.cpus} gpus={needs.gpus} memory_gib={needs.memory_gib:g} minutes={needs.minutes} of "
            f"launcher.partition={self.config.partition}, launcher.options={dict(self.config.options)}; "
            f"launcher.stages.{job.node.stage} changes it"
        )
        try:
            submitted = self.executor.submit(job)
        except FailedJobError as error:
            words = "; ".join(_refusal(str(error)))
            if _is_final(error):
                raise ImpossibleError(f"sbatch: {words} ({asked})") from error
            raise RefusedError(f"sbatch: {words}") from error
        self.queue.add(submitted.job_id)
        return Submitted(submitted, self.queue, asked)

    def close(self) -> None:
        pass


def _refusal(words: str) -> list[str]:
    """What sbatch said, a line each, without what every refusal begins with."""
    said = (re.sub(r"^sbatch: (error: )?(Batch job submission failed: )?", "", line) for line in words.splitlines())
    return [line.strip() for line in said if line.strip() and not line.startswith("Try ")]


def _is_final(error: Exception) -> bool:
    """Whether sbatch refused the request itself, so that asking again is in vain."""
    code = error.__cause__.returncode if isinstance(error.__cause__, subprocess.CalledProcessError) else 1
    return code == BAD_OPTIONS or any(FINAL.match(line) for line in _refusal(str(error)))
