"""``run.py -m``: the grid of a sweep is planned, built and reported as a whole, in place of Hydra's loop over jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from pipelines.answer import ending
from pipelines.grid import compose_grid
from pipelines.report import PAPER, Missing, commands_of, report_cells, send
from pipelines.sweep import Sweep, entry
from pipelines.track import Tracking, group_of
from pmpd.artifacts import Store
from pmpd.config import ConfigError, ReportKind

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""Hydra's own sweeper, whose cells are known before the first runs; another one, say a tuner's, keeps Hydra's loop."""


class WholeSweep(Callback):
    """Hydra's hook before a sweep; ends the process when the sweep has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The sweep's own overrides are the grid."""
        if config.hydra.sweeper.get("_target_") != GRID:
            return
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        with ending():
            missing = run_grid([str(o) for o in config.hydra.overrides.task])
        sys.exit(1 if missing else 0)


def run_grid(overrides: Sequence[str], out: Path | None = None) -> list[Missing]:
    """Build every cell of the grid behind ``overrides`` and write its report; returns the cells that are missing.

    Raises:
        ValueError, StoreError: nothing can be run.
    """
    cells, configs = compose_grid(overrides)
    first = configs[0]
    if first.report is ReportKind.npu:
        raise ConfigError(
            f"report={first.report.value}: no cell to run; give the same choices to python pipelines/report.py"
        )
    store = Store(Path(first.store))
    out = out or PAPER / first.run_name
    tracking = Tracking(first, group_of(first.run_name, overrides), store)
    sweep = Sweep(store, [entry(c, config) for c, config in zip(cells, configs, strict=True)], tracking.stages)
    sweep.run()
    done = report_cells(cells, configs, out, [e.error for e in sweep.entries])
    send(out, first.run_name, commands_of(overrides, done.missing))
    for cell, record in done.found:
        tracking.cell(cell, record)
    tracking.sweep(first.run_name, out, done.missing)
    return done.missing


__all__ = ["WholeSweep", "run_grid"]
