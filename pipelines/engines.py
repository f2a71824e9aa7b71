"""Where a job runs: in a process of this machine, on Slurm (through submitit), or on Ray.

An engine starts jobs and says whether they still run. What a job left, and whether that is what was wanted, is the
store's to say; an engine does not know what a stage is.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numba
import torch

from pmpd.artifacts import Node, Store
from pmpd.config import ConfigError, LauncherConfig, LauncherKind, NeedsConfig
from pmpd.locks import Patience
from pmpd.stages import execute

log = logging.getLogger(__name__)

GRACE_S = 90
"""Slurm's warning before a time limit or a preemption."""
SQUEUE_EVERY_S = 2.0
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""Slurm's words for a job that has not ended; every other one is an end."""


class State(Enum):
    waiting = "waiting"
    running = "running"
    ended = "ended"


class Handle(Protocol):
    """A job that was started."""

    def state(self) -> State: ...

    def said(self) -> str:
        """Where its words are, or what ended it: for a job that left neither an artifact nor an error."""

    def cancel(self) -> None: ...


class Engine(Protocol):
    """Starts jobs."""

    def has_room(self, needs: NeedsConfig) -> bool:
        """Whether a job may be submitted now; an engine that queues always has."""

    def submit(self, job: Build, needs: NeedsConfig) -> Handle: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Build:
    """What a job does: one artifact, and what is missing before it.

    Attributes:
        folder: the working directory that relative paths are meant from.
        threads: None: as many as the process has.
    """

    node: Node
    store: str
    folder: str
    threads: int | None
    patience: Patience | None = None

    @property
    def name(self) -> str:
        return f"{self.node.stage}-{self.node.key}"

    def __call__(self) -> None:
        os.chdir(self.folder)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        logging.getLogger("numba").setLevel(logging.WARNING)
        if self.threads is not None:
            set_threads(self.threads)
        Store(Path(self.store), self.patience).materialize(self.node, execute)

    def checkpoint(self) -> Any:
        """Submitit's hook before a requeue: the same again, since the store keeps the parts."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


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


class Forked:
    """A process of this machine."""

    def __init__(self, process: Any, log_file: Path) -> None:
        self.process = process
        self.log_file = log_file

    def state(self) -> State:
        return State.running if self.process.is_alive() else State.ended

    def said(self) -> str:
        code = self.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}; what it printed: {self.log_file}"

    def cancel(self) -> None:
        self.process.kill()
        self.process.join()


class Local:
    """Processes of this machine, at most as many as its cores, memory and GPUs hold.

    They are forked from a server that has the libraries imported (6 s of a core each otherwise, torch and
    transformers on two cores), and each is on its own: what kills one leaves the others.
    """

    def __init__(self, config: LauncherConfig, cpus: int, memory_gib: float, gpus: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.folder = Path(config.folder)
        self.total = NeedsConfig(cpus=cpus, memory_gib=memory_gib, gpus=gpus)
        self.running: list[tuple[Forked, NeedsConfig]] = []

    def has_room(self, needs: NeedsConfig) -> bool:
        self.running = [(handle, taken) for handle, taken in self.running if handle.state() is not State.ended]
        if not self.running:
            return True  # one that asks for more than there is runs alone
        taken = [n for _, n in self.running]
        return (
            sum(n.cpus for n in taken) + needs.cpus <= self.total.cpus
            and sum(n.memory_gib for n in taken) + needs.memory_gib <= self.total.memory_gib
            and sum(n.gpus for n in taken) + needs.gpus <= self.total.gpus
        )

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        self.folder.mkdir(parents=True, exist_ok=True)
        log_file = (self.folder / f"{job.name}.log").absolute()
        # No GPU is hidden from a job: how many are used at a time is counted in has_room.
        process = self.context.Process(target=_forked, args=(job, str(log_file)), name=job.name)
        process.start()
        handle = Forked(process, log_file)
        self.running.append((handle, needs))
        return handle

    def close(self) -> None:
        pass


def _forked(job: Build, log_file: str) -> None:
    with Path(log_file).open("a", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the sweep ends its jobs itself
    job()


class Queue:
    """What squeue says of this user's jobs, asked once every few seconds for all of them."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._asked = 0.0
        self._submitted: dict[str, float] = {}

    def add(self, job_id: str) -> None:
        self._submitted[job_id] = time.monotonic()

    def state(self, job_id: str) -> State:
        """A job that is not listed has ended, unless it is so new that it may not be listed yet."""
        now = time.monotonic()
        if now - self._asked > SQUEUE_EVERY_S:
            self._ask()
            self._asked = now
        word = self._words.get(job_id)
        if word is None:
            return State.waiting if now - self._submitted.get(job_id, 0.0) < 5 * SQUEUE_EVERY_S else State.ended
        if word in WAITING:
            return State.waiting
        return State.running if word in RUNNING else State.ended

    def _ask(self) -> None:
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:  # a controller that is away for a moment
            log.warning("squeue does not answer (%s); asked again", error)
            return
        self._words = dict(line.split() for line in asked.stdout.splitlines() if line.strip())


class Slurm:
    """Batch jobs. What is cancelled or killed is seen in squeue, so that no accounting is needed.

    Raises:
        ConfigError: submitit is not installed, or this machine has no sbatch.
    """

    def __init__(self, config: LauncherConfig) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("launcher=slurm needs submitit: pip install 'pmpd[slurm]'") from error
        if submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError("launcher=slurm is not possible: there is no sbatch here; launcher=local needs none")
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
        submitted = self.executor.submit(job)
        self.queue.add(submitted.job_id)
        return Submitted(submitted, self.queue)

    def close(self) -> None:
        pass


class Task:
    """A Ray task."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray = ray
        self.reference = reference
        self.why = "Ray says nothing"

    def state(self) -> State:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return State.running
        try:
            self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            self.why = f"Ray: {str(error).strip().splitlines()[-1]}"
        return State.ended

    def said(self) -> str:
        return self.why

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


class Ray:
    """Ray tasks, on a cluster that runs or on one of this machine for the time of the run.

    Raises:
        ConfigError: Ray is not installed, or does not answer.
    """

    def __init__(self, config: LauncherConfig, cpus: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("launcher=ray needs Ray: pip install 'pmpd[ray]'") from error
        self.ray = ray
        own: dict[str, Any] = {} if config.address else {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.WARNING, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"launcher.address={config.address} is not possible: {error}") from error

    def has_room(self, needs: NeedsConfig) -> bool:
        return True

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        remote = self.ray.remote(_call).options(
            name=job.name,
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=int(needs.memory_gib * 2**30),
            max_retries=0,
        )
        return Task(self.ray, remote.remote(job))

    def close(self) -> None:
        self.ray.shutdown()


def _call(job: Build) -> None:
    job()


def open_engine(config: LauncherConfig) -> Engine | None:
    """The engine of ``config``; None for ``serial``, which needs none.

    Raises:
        ConfigError: its package or its cluster is not there.
    """
    cpus, memory_gib = here(config)
    match config.kind:
        case LauncherKind.serial:
            return None
        case LauncherKind.local:
            return Local(config, cpus, memory_gib, torch.cuda.device_count())
        case LauncherKind.slurm:
            return Slurm(config)
        case LauncherKind.ray:
            return Ray(config, cpus)


def set_threads(threads: int) -> None:
    """For torch and numba alike: numba's OpenMP layer sets torch's number to its own when it first runs."""
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))


def needs_of(node: Node, config: LauncherConfig) -> NeedsConfig:
    """What a job for ``node`` asks for: its stage's share, cut to the launcher's limits, GPUs only on a GPU.

    A machine's own cores and memory are limits where jobs stay on it.
    """
    needs = config.stages.get(node.stage, NeedsConfig())
    cpus, memory_gib = config.max_cpus, config.max_memory_gib
    if config.kind is LauncherKind.local or (config.kind is LauncherKind.ray and config.address is None):
        cpus, memory_gib = here(config)
    runtime = node.config.get("runtime", node.config)
    return dataclasses.replace(
        needs,
        cpus=min(needs.cpus, cpus or needs.cpus),
        memory_gib=min(needs.memory_gib, memory_gib or needs.memory_gib),
        gpus=needs.gpus if runtime.get("device") == "cuda" else 0,
    )


def here(config: LauncherConfig) -> tuple[int, float]:
    """Cores and GiB of memory of this machine that jobs may have."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return min(cpus, config.max_cpus or cpus), min(memory_gib, config.max_memory_gib or memory_gib)
