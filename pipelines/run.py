"""Run one cell, or with -m a sweep: plan it, check it, build what is missing, and end in a table.

python pipelines/run.py                              the embedded model on shipped news
python pipelines/run.py experiment=quickstart        five schedulers, a table and a figure
python pipelines/run.py model=vicuna7b task=cnndm scheduler=learned
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

# libgomp's threads spin between operations, so two processes on the same cores slow each other down (SmolLM2, batch
# 16, two cores, tokens/s: 123 to 146 alone, 31 each beside a second run; with this 122 and 66). Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from transformers.utils import logging as transformers_logging

from pipelines.gpu import gpu_cell, write_gpu_report
from pipelines.plan import BASELINES, Cell, Planner
from pipelines.preflight import cells_of, check_disk, check_sources, describe
from pipelines.report import cell_records, write_report
from pipelines.schema import register
from pmpd.artifacts import Node, Store, StoreError, disk_is_full
from pmpd.config import Config, ConfigError, ReportKind, from_omegaconf
from pmpd.kernels import CudaUnavailableError
from pmpd.stages import SUMMARY, execute, read_summary
from pmpd.tracking import Tracker, open_tracker

log = logging.getLogger("pmpd.run")

register()


def run_cell(config: Config, out: Path, job: str) -> None:
    """Build everything that a cell needs, track it, and write its table and figures below ``out``.

    Raises:
        ValueError, StoreError: anything that a user can mend; nothing that was finished is lost.
    """
    if config.report is ReportKind.npu:
        raise ConfigError(
            f"report={config.report.value}: no cell to run; give the same choices to python pipelines/report.py"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    store = Store(Path(config.store))
    if config.report is ReportKind.gpu:
        _time_gpu(config, store, out, job)
        return
    check_sources(config, store)
    planner = Planner(config, store)
    check_disk(planner)
    kinds = [*(kind for kind in BASELINES if kind is not config.scheduler.kind), config.scheduler.kind]
    cells = cells_of(planner, kinds)
    log.info(
        "plan for %s, %s, %s\n%s\n",
        config.model.name,
        config.task.name,
        config.scheduler.name,
        describe(planner, cells),
    )
    tracker = _tracker(config, f"{config.model.name}-{config.task.name}-{config.scheduler.name}-{job}")
    try:
        builder = Builder(store, tracker)
        if not cells:
            builder.build(planner.search)
            cells = [planner.cell(kind) for kind in kinds]
            log.info("the search found %s bits; plan\n%s\n", cells[0].precisions.high, describe(planner, cells))
        for cell in cells:
            for target in cell.targets:
                builder.build(target)
        _say_search(cells[-1], store)
        write_report(cell_records(cells, store), out)
    finally:
        tracker.finish()


def _time_gpu(config: Config, store: Store, out: Path, job: str) -> None:
    """Time a model's shapes on the GPU at hand, and write the table of that model below ``out``."""
    cell = gpu_cell(config, store)
    tracker = _tracker(config, f"{config.model.name}-gpu-{job}")
    try:
        builder = Builder(store, tracker)
        for node in cell.targets:
            builder.build(node)
        log.info("\n%s", write_gpu_report([cell], store, out))
    finally:
        tracker.finish()


def _tracker(config: Config, name: str) -> Tracker:
    return open_tracker(
        config.tracking.mode.value,
        project=config.tracking.project,
        entity=config.tracking.entity,
        dir=config.tracking.dir,
        config=_plain(config),
        group=config.run_name,
        name=name,
        tags=[config.model.name, config.task.name, config.scheduler.name, config.budget.name],
    )


class Builder:
    """Materialises recipes and tells the tracker of every stage, once."""

    def __init__(self, store: Store, tracker: Tracker) -> None:
        self.store = store
        self.tracker = tracker
        self._built: set[str] = set()
        self._tracked: set[str] = set()

    def build(self, target: Node) -> None:
        """Build ``target`` where it is missing, and track it with every ancestor that the store holds."""
        self.store.materialize(target, self._execute)
        for node in target.ancestors():
            path = self.store.path(node)
            if node.key in self._tracked or not (path / SUMMARY).exists():
                continue
            self._tracked.add(node.key)
            summary = read_summary(path)
            inputs = {name: parent.key for name, parent in node.inputs.items()}
            label = _label(node)
            self.tracker.lineage(node.stage, node.key, inputs, str(path), node.key not in self._built)
            self.tracker.metrics(label, {k: v for k, v in summary["metrics"].items() if v is not None})
            for name, rows in summary["curves"].items():
                self.tracker.curve(label, name, rows)
            for name, rows in summary["tables"].items():
                self.tracker.table(label, name, rows)

    def _execute(self, node: Node, inputs: Mapping[str, Path], work: Path) -> None:
        started = time.monotonic()
        log.info("%-13s %s ...", node.stage, node.key)
        execute(node, inputs, work)
        log.info("%-13s %s done in %.1f s", node.stage, node.key, time.monotonic() - started)
        self._built.add(node.key)


def _label(node: Node) -> str:
    """The stage, with the scheduler where a run has one of each: ``evaluate/static``."""
    evaluation = node.inputs.get("evaluation", node)
    scheduler = evaluation.config.get("scheduler") if isinstance(evaluation, Node) else None
    return f"{node.stage}/{scheduler}" if scheduler else node.stage


def _say_search(cell: Cell, store: Store) -> None:
    metrics = read_summary(store.path(cell.search))["metrics"]
    found = metrics["lowest_lossless_bits"]
    pair = (metrics["pair_prefill_bits"], metrics["pair_decode_bits"])
    log.info(
        "search: lowest precision within %.3g of fp16's perplexity: %s; cheapest (prefill, decode) pair: %s; "
        "used here: %s (%s)",
        metrics["tolerance"],
        f"{found} bits" if found else "none",
        pair if pair[0] else "none",
        "/".join(map(str, cell.precisions.levels)),
        cell.precisions.source,
    )


def _plain(value: Any) -> Any:
    """Configuration as JSON-able values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(node: DictConfig) -> None:
    """Hydra's entry: compose, check, run; a mistake of the user's is one line, not a traceback."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    runtime = HydraConfig.get()
    out = Path(runtime.runtime.output_dir)
    try:
        run_cell(from_omegaconf(node), out, out.name)
    except (ValueError, StoreError, CudaUnavailableError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        log.error("error: %s", error)
        if runtime.mode is not RunMode.MULTIRUN:
            sys.exit(1)
        log.error("the sweep goes on; its report will name this cell")
    except OSError as error:
        if not disk_is_full(error):
            raise
        log.error("error: the disk is full (%s); free some space and run the same command again", error)
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
