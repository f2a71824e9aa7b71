"""What a person sees of a sweep while it runs: one live screen on a terminal, a line for each change elsewhere.

Counts cells and jobs and estimates the time left; decides nothing.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.dispatch import Job, Phase

log = logging.getLogger("pmpd.sweep")

RUNNING_SHOWN = 8


@dataclass(frozen=True)
class CellView:
    """A row of the sweep's table: its name, and the jobs that it waits for (none: it was cached)."""

    name: str
    jobs: frozenset[str]

    def state(self, jobs: Mapping[str, Job]) -> str:
        """``cached``, ``done``, ``failed``, ``running`` or ``waiting``."""
        phases = {jobs[key].phase for key in self.jobs}
        if not phases:
            return "cached"
        if Phase.failed in phases:
            return "failed"
        if phases == {Phase.done}:
            return "done"
        return "running" if phases - {Phase.waiting} else "waiting"


class Screen:
    """The state of a sweep, as text or as a live table."""

    def __init__(self, cells: Sequence[CellView], jobs: Mapping[str, Job], known_s: Mapping[str, float]) -> None:
        """
        Args:
            known_s: seconds that each stage took before, by name.
        """
        self.cells = cells
        self.jobs = jobs
        self.known_s = known_s
        self.live: Live | None = None

    def counts(self) -> dict[str, int]:
        """Cells by state."""
        found = dict.fromkeys(("cached", "done", "running", "waiting", "failed"), 0)
        for cell in self.cells:
            found[cell.state(self.jobs)] += 1
        return found

    def left_s(self) -> tuple[float, bool]:
        """Seconds until the last job ends if jobs go on as they did, and whether every open job is in it.

        A job takes what its stage took on average, in this sweep, else before; what never ran is not in it. Jobs run as
        many at a time as now.
        """
        took: dict[str, list[float]] = {}
        for job in self.jobs.values():
            if job.phase is Phase.done and job.started is not None and job.ended is not None:
                took.setdefault(job.node.stage, []).append(job.ended - job.started)
        mean = dict(self.known_s) | {stage: sum(s) / len(s) for stage, s in took.items()}
        open_jobs = [j for j in self.jobs.values() if j.phase in (Phase.waiting, Phase.running)]
        known = [j for j in open_jobs if j.node.stage in mean]
        now = time.monotonic()
        work = sum(max(mean[j.node.stage] - (now - j.started if j.started else 0.0), 0.0) for j in known)
        return work / max(1, sum(j.phase is Phase.running for j in open_jobs)), known == open_jobs

    def left(self) -> str:
        """``5 min left``, ``over 5 min left`` where some stage's time is not known yet; empty where none is."""
        seconds, whole = self.left_s()
        return f"{'' if whole else 'over '}{duration(seconds)} left" if seconds else ""

    def line(self) -> str:
        """The whole state in one line."""
        counts = self.counts()
        done = sum(j.phase is Phase.done for j in self.jobs.values())
        cells = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        return "; ".join(filter(None, (f"cells: {cells}", f"jobs {done}/{len(self.jobs)}", self.left())))

    def changed(self, job: Job) -> None:
        """A job's phase changed."""
        if self.live is not None:
            self.live.refresh()
        elif job.phase is Phase.running:
            log.info("%s ...", job.label)
        elif job.phase is Phase.done:
            log.info("%s done in %s | %s", job.label, duration((job.ended or 0.0) - (job.started or 0.0)), self.line())

    def table(self) -> RenderableType:
        """What the live screen shows."""
        counts, jobs = self.counts(), list(self.jobs.values())
        done = sum(j.phase is Phase.done for j in jobs)
        cells = Table.grid(padding=(0, 3))
        cells.add_row(*(Text(f"{n} {state}", style=_style(state)) for state, n in counts.items()))
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            f"jobs {done}/{len(jobs)}",
            ProgressBar(total=max(len(jobs), 1), completed=done, width=40),
            self.left(),
        )
        rows = Table.grid(padding=(0, 2))
        running = [j for j in jobs if j.phase is Phase.running]
        for job in running[:RUNNING_SHOWN]:
            elapsed = time.monotonic() - (job.started or time.monotonic())
            rows.add_row(Text(job.node.stage, style="bold"), job.node.key, duration(elapsed))
        if len(running) > RUNNING_SHOWN:
            rows.add_row(f"and {len(running) - RUNNING_SHOWN} more")
        failed = [Text(f"{j.label}: {j.error}", style="red", overflow="ellipsis", no_wrap=True)
                  for j in jobs if j.phase is Phase.failed]  # fmt: skip
        return Group(cells, bar, rows, *failed[-3:])

    @contextmanager
    def open(self, stream: io.TextIOBase | None = None) -> Iterator[None]:
        """Show it while the block runs: live where standard output is a terminal, else by lines of the log.

        A live screen owns the terminal: what is logged appears above it, and stages see no terminal to draw bars on.
        """
        console = Console(file=stream) if stream is not None else Console()  # type: ignore[arg-type]
        if not console.is_terminal:
            yield
            return
        handlers = [
            h
            for h in logging.getLogger().handlers
            if isinstance(h, logging.StreamHandler) and h.stream in (sys.stdout, sys.stderr)
        ]
        streams = [h.stream for h in handlers]
        above = _NoTerminal(console, console.file)
        with (
            Live(get_renderable=self.table, console=console, redirect_stdout=False, redirect_stderr=False) as self.live,
            redirect_stdout(above),
            redirect_stderr(above),
        ):
            for handler in handlers:
                handler.setStream(above)
            try:
                yield
            finally:
                for handler, old in zip(handlers, streams, strict=True):
                    handler.setStream(old)
        self.live = None


class _NoTerminal(FileProxy):
    def isatty(self) -> bool:
        return False


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _style(state: str) -> str:
    return {"failed": "red", "running": "cyan", "done": "green", "cached": "green"}.get(state, "dim")
