"""A grid of cells as one piece of work: planned together, each shared artifact built once, ended in one report.

Hydra composes the cells; its loop over jobs is not used, because a job of Hydra's is a whole cell, and two cells share
most of what they need. A cell that cannot be planned or built is named in the report with its reason; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.dispatch import Dispatcher, Job, Phase, jobs_for
from pipelines.engines import open_engine
from pipelines.gpu import gpu_cell
from pipelines.jobs import Engine, set_threads
from pipelines.plan import INPUT_STAGES, MissingSearchError, Planner
from pipelines.preflight import check_disk, check_sources
from pipelines.screen import CellView, Screen
from pmpd.artifacts import MANIFEST, Node, Store, StoreError, read_json
from pmpd.config import Config, ReportKind
from pmpd.stages import execute

log = logging.getLogger("pmpd.sweep")

DURATIONS_READ = 200
"""Manifests of each stage that are read for how long it takes: enough for a mean."""


@dataclass
class Entry:
    """A cell of the grid on its way.

    Attributes:
        name: what the screen calls it.
        planned: its targets are given.
        search: its precisions hang on this artifact, which is not there yet.
        error: why it was given up.
    """

    name: str
    config: Config
    targets: list[Node] = field(default_factory=list)
    planned: bool = False
    search: Node | None = None
    error: str = ""


@dataclass
class Sweep:
    """Builds what cells need.

    Attributes:
        built: told of every artifact that a job made, when it is there.
    """

    store: Store
    entries: list[Entry]
    built: Callable[[Node], None] = lambda node: None

    def run(self) -> None:
        """Plan, build, and plan again what hung on a precision search; errors are left in the entries."""
        launcher, threads = self.entries[0].config.launcher, self.entries[0].config.threads
        if threads is not None:
            set_threads(threads)
        engine: Engine | None = None
        try:
            self._plan(self.entries)
            while True:
                targets = self._targets()
                jobs = jobs_for(targets, self.store, INPUT_STAGES)
                if jobs:
                    engine = engine or open_engine(launcher)
                    self._build(jobs, engine)
                waiting = [e for e in self.entries if e.search is not None and not e.error]
                if not waiting:
                    return
                self._plan(waiting)
        finally:
            if engine is not None:
                engine.close()

    def _plan(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.planned:
                continue
            try:
                entry.targets, entry.search = targets_of(entry.config, self.store)
            except (ValueError, StoreError) as error:
                entry.error = str(error)
                log.error("%s: %s; the sweep goes on, its report names this cell", entry.name, error)

    def _targets(self) -> list[Node]:
        return list({n.key: n for e in self.entries if not e.error for n in e.targets}.values())

    def _build(self, jobs: dict[str, Job], engine: Engine | None) -> None:
        cells = [CellView(e.name, reach(jobs, e.targets)) for e in self.entries if not e.error]
        screen = Screen(cells, jobs, known_durations_s(self.store, jobs))
        log.info("%s", screen.line())
        first = self.entries[0].config

        def watch(job: Job) -> None:
            screen.changed(job)
            if job.phase is Phase.done:
                self.built(job.node)

        dispatcher = Dispatcher(
            self.store,
            first.launcher,
            engine,
            lambda node: self.store.materialize(node, execute),  # type: ignore[arg-type]
            first.threads,
            watch,
        )
        with screen.open():
            dispatcher.run(jobs)
        for entry in self.entries:
            failed = [jobs[n.key].error for n in entry.targets if n.key in jobs and jobs[n.key].phase is Phase.failed]
            entry.error = entry.error or (failed[0] if failed else "")


def targets_of(config: Config, store: Store) -> tuple[list[Node], Node | None]:
    """What a cell's report reads; only its precision search, returned a second time, if all else hangs on that.

    Raises:
        ValueError: something that the cell needs is not there or not possible.
    """
    if config.report is ReportKind.gpu:
        return gpu_cell(config, store).targets, None
    check_sources(config, store)
    planner = Planner(config, store)
    check_disk(planner)
    try:
        return planner.cell().read, None
    except MissingSearchError:
        return [planner.search], planner.search


def reach(jobs: Mapping[str, Job], targets: Sequence[Node]) -> frozenset[str]:
    """The jobs that ``targets`` wait for, directly or not."""
    found: set[str] = set()
    ahead = [n.key for n in targets if n.key in jobs]
    while ahead:
        key = ahead.pop()
        if key not in found:
            found.add(key)
            ahead += jobs[key].after
    return frozenset(found)


def known_durations_s(store: Store, jobs: Mapping[str, Job]) -> dict[str, float]:
    """Mean seconds that each stage of ``jobs`` took before in this store."""
    means: dict[str, float] = {}
    for stage in {job.node.stage for job in jobs.values()}:
        found = [_duration_s(p) for p in sorted((store.root / stage).glob(f"*/{MANIFEST}"))[:DURATIONS_READ]]
        known = [s for s in found if s is not None]
        if known:
            means[stage] = sum(known) / len(known)
    return means


def _duration_s(manifest: Path) -> float | None:
    try:
        return float(read_json(manifest)["duration_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def entry(overrides: Sequence[str], config: Config) -> Entry:
    """A cell under the name of what tells it from others of its grid."""
    swept = [o for o in overrides if not o.startswith("experiment=")]
    return Entry(" ".join(swept) or config.run_name, config)


def build_cell(targets: Sequence[Node], config: Config, store: Store, built: Callable[[Node], None]) -> None:
    """Build what one run needs by the jobs of its launcher.

    Raises:
        StoreError: a job failed.
    """
    alone = Entry(config.run_name, config, list(targets), planned=True)
    Sweep(store, [alone], built).run()
    if alone.error:
        raise StoreError(alone.error)
