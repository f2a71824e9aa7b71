"""Builds a graph of artifacts by jobs: each once, when what it needs is there; a failure stops what hangs on it.

Asks the store what is there and an engine to run jobs; does not know cells, schedulers or where jobs run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from pipelines.engines import needs_of
from pipelines.jobs import Build, Engine, Handle, ImpossibleError, RefusedError, State
from pmpd.artifacts import DamagedArtifactError, Node, Store, StoreError
from pmpd.config import LauncherConfig

log = logging.getLogger(__name__)

OWN_MACHINE = ("latency", "linears")
"""Times are keyed by this machine, so they are taken here, and when nothing else runs here."""
POLL_S = 0.2
REFUSED_PAUSE_S = 30.0
"""An engine that refused a job is left alone for so long."""
REFUSALS = 20
"""So many refusals in a row, with no job out whose end could make room, are final."""


class Phase(Enum):
    """Where a job is."""

    waiting = "waiting"
    running = "running"
    done = "done"
    failed = "failed"


@dataclass
class Job:
    """An artifact to build.

    Attributes:
        after: keys of the jobs that it needs.
        replaces: there is an artifact, and it is damaged.
        started: by ``time.monotonic``, once it runs.
        refused: how often the engine did not take it; who was refused less is tried first.
        error: why there is no artifact, once it failed.
        inherited: it failed because something that it needs did.
    """

    node: Node
    after: frozenset[str]
    replaces: bool = False
    phase: Phase = Phase.waiting
    attempts: int = 0
    refused: int = 0
    started: float | None = None
    ended: float | None = None
    error: str = ""
    inherited: bool = False

    @property
    def label(self) -> str:
        return f"{self.node.stage} {self.node.key}"


Watch = Callable[[Job], None]
"""Told of every change of a job's phase."""


def jobs_for(targets: Iterable[Node], store: Store, first: Container[str] = ()) -> dict[str, Job]:
    """The jobs that build what is missing of ``targets``, by key, in an order that can be run.

    Stages of ``first`` come first. What is cached hides what it was made of. Targets are small results that a report
    will read, so the digests of what it reads (JSON) are checked, and a damaged one counts as missing.
    """
    wanted = {node.key: node for node in targets}
    jobs: dict[str, Job] = {}
    seen: set[str] = set()

    def visit(node: Node) -> None:
        seen.add(node.key)
        if is_there(store, node, check=node.key in wanted):
            return
        parents = [parent for parent in node.inputs.values() if isinstance(parent, Node)]
        for parent in parents:
            if parent.key not in seen:
                visit(parent)
        after = frozenset(parent.key for parent in parents if parent.key in jobs)
        jobs[node.key] = Job(node, after, replaces=store.status(node) == "cached")

    for node in wanted.values():
        if node.key not in seen:
            visit(node)
    return dict(sorted(jobs.items(), key=lambda item: item[1].node.stage not in first))


def is_there(store: Store, node: Node, *, check: bool) -> bool:
    """Whether ``node`` is in the store; with ``check`` also whether its files are what was written."""
    if store.status(node) != "cached":
        return False
    if check:
        try:
            store.verify(node, ".json")
        except DamagedArtifactError as error:
            log.warning("damaged artifact, built again: %s", error)
            return False
    return True


@dataclass
class Dispatcher:
    """Runs jobs to their end.

    Attributes:
        build: builds an artifact in this process: every one without an engine, else that of a stage which asks for no
            job, because it costs seconds or is of this machine.
        threads: of each job; None for the cores that it asked for.
    """

    store: Store
    launcher: LauncherConfig
    engine: Engine | None
    build: Callable[[Node], None]
    threads: int | None = None
    watch: Watch = lambda job: None
    _handles: dict[str, Handle] = field(default_factory=dict)
    _refusals: int = 0
    _refused_until: float = 0.0

    def run(self, jobs: dict[str, Job]) -> None:
        """Returns when every job is done or failed; jobs that run are cancelled if this is interrupted."""
        try:
            while True:
                self._collect(jobs)
                self._start(jobs)
                if all(job.phase in (Phase.done, Phase.failed) for job in jobs.values()):
                    return
                time.sleep(POLL_S if self.engine is not None else 0)
        except BaseException:
            for handle in self._handles.values():
                handle.cancel()
            raise

    def _start(self, jobs: dict[str, Job]) -> None:
        for job in sorted(jobs.values(), key=lambda job: job.refused):
            if job.phase is not Phase.waiting or job.node.key in self._handles:
                continue
            before = [jobs[key] for key in job.after]
            lost = next((b for b in before if b.phase is Phase.failed), None)
            if lost is not None:
                cause = lost.error if lost.inherited else f"{lost.label}: {lost.error}"
                job.inherited = True
                self._end(job, cause)
            elif all(b.phase is Phase.done for b in before):
                if self.engine is None or job.node.stage not in self.launcher.stages:
                    if not self._handles or job.node.stage not in OWN_MACHINE:
                        self._run_here(job)
                        return  # its successors come first in the next round
                else:
                    self._submit(job)

    def _submit(self, job: Job) -> None:
        assert self.engine is not None
        needs = needs_of(job.node, self.launcher)
        if time.monotonic() < self._refused_until or not self.engine.has_room(needs):
            return
        threads = self.threads if self.threads is not None else needs.cpus
        build = Build(job.node, str(self.store.root.absolute()), str(Path.cwd()), threads, self.store.patience)
        self.store.forget_failure(job.node)  # an earlier attempt's: what is there at the end is this one's
        try:
            self._handles[job.node.key] = self.engine.submit(build, needs)
        except RefusedError as error:
            self._refuse(job, str(error))
            return
        except ImpossibleError as error:
            self._give_up(job, f"refused: {error}")
            return
        job.attempts += 1
        self._refusals = 0
        log.debug("%s submitted", job.label)

    def _refuse(self, job: Job, words: str) -> None:
        """Leave the job waiting, or give it up after many refusals that the end of no job explains."""
        job.refused += 1
        self._refusals = 0 if self._handles else self._refusals + 1
        if self._refusals > REFUSALS:
            self._give_up(job, f"refused: {words}")
            return
        self._refused_until = time.monotonic() + REFUSED_PAUSE_S
        log.warning("%s was refused (%s); tried again in %.0f s", job.label, words, REFUSED_PAUSE_S)

    def _run_here(self, job: Job) -> None:
        self._change(job, Phase.running)
        try:
            self.build(job.node)
        except (ValueError, StoreError) as error:
            self._end(job, str(error))
        except Exception as error:
            # A stage may fail in any way; what does not hang on it goes on, and the report says what happened.
            log.exception("%s failed", job.label)
            self._end(job, f"{type(error).__name__}: {error}")
        else:
            self._end(job, None)

    def _collect(self, jobs: dict[str, Job]) -> None:
        for key, handle in list(self._handles.items()):
            job, state = jobs[key], handle.state()
            if state is State.running and job.phase is Phase.waiting:
                self._change(job, Phase.running)
            if state is State.stuck:
                del self._handles[key]
                self._give_up(job, f"never started; {handle.said()}")
                handle.cancel()
            if state is not State.ended:
                continue
            del self._handles[key]
            if is_there(self.store, job.node, check=job.replaces):
                self._end(job, None)
            elif (error := self.store.failure(job.node)) is not None:
                self._end(job, error)
            elif job.attempts <= self.launcher.retries:
                log.warning("%s was killed (attempt %d); it goes on from its parts", job.label, job.attempts)
                self._change(job, Phase.waiting)
            else:
                self._give_up(job, f"killed, {job.attempts} times; {handle.said()}")

    def _give_up(self, job: Job, error: str) -> None:
        """End a job that could say nothing itself; a later report finds the words in the store."""
        self.store.note_failure(job.node, error)
        self._end(job, error)

    def _end(self, job: Job, error: str | None) -> None:
        job.error = error or ""
        if error is not None:
            log.error("%s %s: %s", job.label, "is given up" if job.inherited else "failed", error)
        self._change(job, Phase.done if error is None else Phase.failed)

    def _change(self, job: Job, phase: Phase) -> None:
        job.phase = phase
        if phase is Phase.running:
            job.started = time.monotonic()
        elif phase is not Phase.waiting:
            job.ended = time.monotonic()
        self.watch(job)
