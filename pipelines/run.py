"""Run one cell, or with -m a sweep (``pipelines/multirun.py``): plan, check, build what is missing, end in a table.

python pipelines/run.py                              the embedded model on shipped news
python pipelines/run.py experiment=quickstart        five schedulers, a table and a figure
python pipelines/run.py model=vicuna7b task=cnndm scheduler=learned
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.interrupts import leave_at_once

if __name__ == "__main__":
    leave_at_once()
# libgomp's threads spin between operations, so two processes on the same cores slow each other down (SmolLM2, batch
# 16, two cores, tokens/s: 123 to 146 alone, 31 each beside a second run; with this 122 and 66). Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# numba's OpenMP layer sets torch's number of threads to its own, and times are keyed by that number.
if "OMP_NUM_THREADS" in os.environ:
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# What imports make stays: looking through it for garbage again and again takes a fifth of their time.
gc.disable()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from pipelines.answer import ANSWERED, answer, answered
from pipelines.cells import cell_records
from pipelines.gpu import gpu_cell, write_gpu_report
from pipelines.jobs import set_threads
from pipelines.plan import BASELINES, Cell, Planner
from pipelines.preflight import cells_of, check_disk, check_sources, describe
from pipelines.report import send, write_report
from pipelines.schema import register
from pipelines.sweep import build_cell
from pipelines.track import Tracking
from pmpd.artifacts import Node, Store
from pmpd.config import Config, ConfigError, LauncherKind, ReportKind, from_omegaconf
from pmpd.stages import execute, read_summary

log = logging.getLogger("pmpd.run")

register()
gc.freeze()
gc.enable()


def run_cell(config: Config, out: Path) -> None:
    """Build everything that a cell needs, track it, and write its table and figures below ``out``.

    Raises:
        ValueError, StoreError: anything that a user can mend; nothing that was finished is lost.
    """
    if config.report is ReportKind.npu:
        raise ConfigError(
            f"report={config.report.value}: no cell to run; give the same choices to python pipelines/report.py"
        )
    if config.threads is not None:
        set_threads(config.threads)
    store = Store(Path(config.store))
    tracking = Tracking(config, config.run_name, store)
    if config.report is ReportKind.gpu:
        cell = gpu_cell(config, store)
        _build(cell.targets, config, store, tracking)
        log.info("\n%s", write_gpu_report([cell], store, out))
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
    if not cells:
        _build([planner.search], config, store, tracking)
        cells = [planner.cell(kind) for kind in kinds]
        log.info("the search found %s bits; plan\n%s\n", cells[0].precisions.high, describe(planner, cells))
    _build([target for cell in cells for target in cell.targets], config, store, tracking)
    _say_search(cells[-1], store)
    records = cell_records(cells, store)
    write_report(records, out)
    tracking.cell(cells[-1], records[-1])


def _build(targets: Sequence[Node], config: Config, store: Store, tracking: Tracking) -> None:
    """Here, one after another, so that an error is the stage's own; or by the launcher's jobs."""
    if config.launcher.kind is not LauncherKind.serial:
        build_cell(targets, config, store, tracking.stages)
        return
    for target in targets:
        store.materialize(target, _execute)
        tracking.stages(target)


def _execute(node: Node, inputs: Mapping[str, Path], work: Path) -> None:
    started = time.monotonic()
    log.info("%-13s %s ...", node.stage, node.key)
    execute(node, inputs, work)
    log.info("%-13s %s done in %.1f s", node.stage, node.key, time.monotonic() - started)


def _say_search(cell: Cell, store: Store) -> None:
    metrics = read_summary(store.path(cell.search))["metrics"]
    found = metrics["lowest_lossless_bits"]
    pair = (metrics["pair_prefill_bits"], metrics["pair_decode_bits"])
    log.info(
        "search: lowest precision within %.3g of fp16's perplexity: %s; cheapest (prefill, decode) pair: %s; "
        "used here: %s (%s)",
        metrics["tolerance"],
        f"{found} bits ({metrics['num_windows']} windows, detectable rise {metrics['detectable_rise']:.2%})"
        if found
        else "none",
        pair if pair[0] else "none",
        "/".join(map(str, cell.precisions.levels)),
        cell.precisions.source,
    )


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(node: DictConfig) -> None:
    """Hydra's entry: compose, check, run; a mistake of the user's is one line, not a traceback."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        config, own = from_omegaconf(node), HydraConfig.get()
        out = Path(own.runtime.output_dir)
        run_cell(config, out)
        send(out, config.run_name, [f"python pipelines/run.py {shlex.join(own.overrides.task)}"])
    except ANSWERED as error:
        sys.exit(answer(error))


if __name__ == "__main__":
    answered(main)
