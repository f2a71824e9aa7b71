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
from pathlib import Path
from typing import Any

import torch

from pipelines.jobs import Build, Engine, Handle, State
from pipelines.slurm import Slurm
from pmpd.artifacts import Node
from pmpd.config import ConfigError, LauncherConfig, LauncherKind, NeedsConfig

log = logging.getLogger(__name__)


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
    transformers on two cores), and each is on its own: what kills one leaves the others. Each sees the GPUs that it
    was given and no other.
    """

    def __init__(self, config: LauncherConfig, cpus: int, memory_gib: float, gpus: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.folder = Path(config.folder)
        self.total = NeedsConfig(cpus=cpus, memory_gib=memory_gib, gpus=gpus)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = [str(index) for index in range(gpus)] if visible is None else visible.split(",")[:gpus]
        self.running: list[tuple[Forked, NeedsConfig, list[str]]] = []

    def has_room(self, needs: NeedsConfig) -> bool:
        self.running = [one for one in self.running if one[0].state() is not State.ended]
        if not self.running:
            return True  # one that asks for more than there is runs alone
        taken = [n for _, n, _ in self.running]
        return (
            sum(n.cpus for n in taken) + needs.cpus <= self.total.cpus
            and sum(n.memory_gib for n in taken) + needs.memory_gib <= self.total.memory_gib
            and sum(n.gpus for n in taken) + needs.gpus <= self.total.gpus
        )

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        self.folder.mkdir(parents=True, exist_ok=True)
        log_file = (self.folder / f"{job.name}.log").absolute()
        taken = {gpu for handle, _, gpus in self.running for gpu in gpus if handle.state() is not State.ended}
        gpus = [gpu for gpu in self.gpus if gpu not in taken][: needs.gpus]
        process = self.context.Process(target=_forked, args=(job, str(log_file), gpus), name=job.name)
        process.start()
        handle = Forked(process, log_file)
        self.running.append((handle, needs, gpus))
        return handle

    def close(self) -> None:
        pass


def _forked(job: Build, log_file: str, gpus: list[str]) -> None:
    if gpus:  # read when CUDA starts, which is later
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with Path(log_file).open("a", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the sweep ends its jobs itself
    job()


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

    def __init__(self, config: LauncherConfig, cpus: int, memory_gib: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("launcher=ray needs Ray: pip install 'pmpd[ray]'") from error
        self.ray = ray
        where: dict[str, Any] = {"address": config.address}
        if config.address is None:  # its own share of memory is less than the machine has: a job would wait for ever
            where = {"address": "local", "num_cpus": cpus, "_memory": _bytes(memory_gib), "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"launcher.address={config.address} is not possible: {error}") from error

    def has_room(self, needs: NeedsConfig) -> bool:
        return True

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        asked = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": _bytes(needs.memory_gib)}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
            log.warning(
                "%s waits for a node with cpus=%d gpus=%d memory_gib=%g, which Ray has not now; "
                "launcher.stages.%s.memory_gib, launcher.max_cpus, launcher.max_memory_gib ask for less",
                job.name,
                needs.cpus,
                needs.gpus,
                needs.memory_gib,
                job.node.stage,
            )
        remote = self.ray.remote(_call).options(
            name=job.name, num_cpus=needs.cpus, num_gpus=needs.gpus, memory=asked["memory"], max_retries=0
        )
        return Task(self.ray, remote.remote(job))

    def close(self) -> None:
        self.ray.shutdown()


def _call(job: Build) -> None:
    job()


def _bytes(gib: float) -> int:
    return int(gib * 2**30)


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
            return Ray(config, cpus, memory_gib)


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
