"""What squeue says of jobs: waiting, and for what, running, or gone. It needs no accounting, which is often off.

Knows the words for states and reasons; not what a job does, nor how it came to be one.
"""

from __future__ import annotations

import logging
import re
import subprocess
import time
from dataclasses import dataclass

from pipelines.jobs import State

log = logging.getLogger(__name__)

SQUEUE_EVERY_S = 2.0
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""Slurm's words for a job that has not ended; every other one is an end."""
ORDINARY = ("None", "(null)", "Priority", "Resources", "BeginTime", "Cleaning", "Prolog")
"""Reasons for waiting that pass without anybody; another one is said."""
HOPELESS = re.compile(
    r"Partition(TimeLimit|Config)|BadConstraints|DependencyNeverSatisfied|ReservationDeleted|Invalid(Account|QOS)"
    r"|(Account|QOS)NotAllowed|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+|MaxMemPerLimit|DeadLine"
)
"""Reasons that stand until a person changes the job or the cluster (squeue(1), JOB REASON CODES). A job that asks for
more cores than any node has is taken by sbatch (22.05) and is of ``PartitionConfig``."""
HOPELESS_S = 600.0
"""A job is given up when such a reason has stood for so long: enough to mend it by ``scontrol update``."""


@dataclass(frozen=True)
class Listed:
    """A line of squeue's, and since when its reason has stood."""

    word: str
    reason: str
    since: float


class Queue:
    """What squeue says of this user's jobs, asked once every few seconds for all of them."""

    def __init__(self) -> None:
        self._jobs: dict[str, Listed] = {}
        self._asked = 0.0
        self._answered = 0.0  # when the question was asked whose answer is known
        self._submitted: dict[str, float] = {}
        self._said: set[str] = set()

    def add(self, job_id: str) -> None:
        self._submitted[job_id] = time.monotonic()

    def state(self, job_id: str) -> State:
        """A job that is not listed has ended, unless squeue's last answer is from before it could be listed."""
        now = time.monotonic()
        if now - self._asked > SQUEUE_EVERY_S:
            self._asked = now
            if self._ask():
                self._answered = now
        job = self._jobs.get(job_id)
        if job is None:
            listed_from = self._submitted.get(job_id, 0.0) + 5 * SQUEUE_EVERY_S
            return State.ended if self._answered >= listed_from else State.waiting
        if job.word in WAITING:
            hopeless = HOPELESS.fullmatch(job.reason) and self._answered - job.since >= HOPELESS_S
            return State.stuck if hopeless else State.waiting
        return State.running if job.word in RUNNING else State.ended

    def reason(self, job_id: str) -> str:
        """Why a job waits, in Slurm's words; empty if it does not, or for nothing to speak of."""
        job = self._jobs.get(job_id)
        return job.reason if job and job.word in WAITING and job.reason not in ORDINARY else ""

    def _ask(self) -> bool:
        """Whether squeue answered."""
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T %r"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:  # a controller that is away for a moment
            log.warning("squeue does not answer (%s); asked again", error)
            return False
        found = [line.split(maxsplit=2) for line in asked.stdout.splitlines() if line.strip()]
        before, self._jobs = self._jobs, {}
        for job_id, word, *words in found:
            reason = " ".join(words)
            old = before.get(job_id)
            since = old.since if old is not None and old.reason == reason else self._asked
            self._jobs[job_id] = Listed(word, reason, since)
            if job_id in self._submitted:
                self._say(job_id, self.reason(job_id))
        return True

    def _say(self, job_id: str, reason: str) -> None:
        """A reason once, however many jobs have it."""
        if reason and reason not in self._said:
            self._said.add(reason)
            fate = f"; given up if that stands for {HOPELESS_S / 60:g} minutes" if HOPELESS.fullmatch(reason) else ""
            log.warning("Slurm's job %s waits: %s%s", job_id, reason, fate)
