"""Tables and figures of an experiment or a sweep, from the store alone: no model runs, no GPU, no W&B.

    python pipelines/report.py experiment=quickstart
    python pipelines/report.py task=dialogsum,iwslt scheduler=high,static data.root=DIR
    python pipelines/report.py experiment=npu              # the NPU model alone: needs no store

A cell that is missing is named with the command that fills it.
"""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipelines.interrupts import heard, leave_at_once

if __name__ == "__main__":
    leave_at_once()

from pipelines.answer import ANSWERED, answer
from pipelines.cells import cell_records
from pipelines.gpu import gpu_cell, write_gpu_report
from pipelines.grid import compose_grid
from pipelines.machines import npu_of
from pipelines.notes import LINEARS, PERPLEXITY, caption
from pipelines.plan import Cell, Planner
from pmpd.artifacts import Store, StoreError
from pmpd.config import Config, ReportKind
from pmpd.report import (
    CellRecord,
    category_table,
    draw_cells,
    draw_perplexity,
    draw_quality,
    draw_switch_steps,
    linears_table,
    markdown_table,
    one_each_model,
    perplexity_table,
    summary_table,
    tidy,
)
from pmpd.report.drawings import Drawings
from pmpd.report.export import export
from pmpd.report.npu import write_npu_report
from pmpd.version import code_version

log = logging.getLogger("pmpd.report")

PAPER = Path("outputs/paper")
MANY = 5
"""More cells than this get a figure with a row each: points among each other say less."""


@dataclass(frozen=True)
class Missing:
    """A cell of the grid that the store does not hold."""

    command: str
    reason: str


@dataclass(frozen=True)
class Collected:
    """What a grid's cells have to say: those that are there with what they hold, and those that are missing."""

    found: list[tuple[Cell, CellRecord]]
    missing: list[Missing]


def collect(
    cells: Sequence[Sequence[str]], configs: Sequence[Config], errors: Sequence[str] | None = None
) -> Collected:
    """Compute the keys of every cell and read what is there.

    Args:
        errors: what building each cell just ended in, if it failed; else what the store has noted of it is said.
    """
    stores: dict[str, Store] = {}  # one each: an artifact that cells share is checked once
    found: list[tuple[Cell, CellRecord]] = []
    missing: list[Missing] = []
    for overrides, config, told in zip(cells, configs, errors or [""] * len(cells), strict=True):
        store = stores.setdefault(config.store, Store(Path(config.store)))
        cell = None
        try:
            cell = Planner(config, store, reading=True).cell()
            found += [(cell, record) for record in cell_records([cell], store)]
        except (ValueError, FileNotFoundError, StoreError) as error:
            reason = told or (_failure(cell, store) if cell is not None else "") or str(error)
            missing.append(Missing(_command(overrides), reason))
    return Collected(found, missing)


def _failure(cell: Cell, store: Store) -> str:
    """What the store has noted of the first artifact that the cell misses because building it failed."""
    missing = [n for target in cell.read for n in target.ancestors() if store.status(n) != "cached"]
    noted = ((node, store.failure(node)) for node in missing)
    return next((f"{node.stage} {node.key}: {words}" for node, words in noted if words), "")


def write_report(records: Sequence[CellRecord], out: Path, missing: Sequence[Missing] = ()) -> str:
    """Write ``results.csv``, ``table.md`` and the figures below ``out``; show the tables.

    Cells that are missing are a last table, with what the attempt to build them ended in.

    Returns:
        the tables as Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    tidy(records).to_csv(out / "results.csv", index=False)
    groups: dict[tuple[str, str], list[CellRecord]] = {}
    for record in records:
        group = groups.setdefault((record.model, record.task), [])
        for other in group:
            if (other.scheduler, other.prefill_bits, other.levels) == (
                record.scheduler,
                record.prefill_bits,
                record.levels,
            ):
                log.warning(
                    "two cells of %s, %s, %s differ in something that the table does not show; tell them by their key "
                    "in results.csv",
                    record.model,
                    record.task,
                    record.scheduler,
                )
        group.append(record)
    texts, drawings = [], Drawings(out)
    for (model, task), group in groups.items():
        text = f"## {model}, {task}\n\n{summary_table(group)}\n\n{caption(group)}"
        if categories := category_table(group):
            text += f"\n\n{categories}"
        if group[0].linears:
            text += f"\n\n{LINEARS}:\n\n{linears_table(group[0].linears)}"
        texts.append(text)
        stem = f"{model}_{task}"
        drawings.add(draw_quality, group, name=f"quality_{stem}.png")
        if len(group) > MANY:
            drawings.add(draw_cells, group, name=f"cells_{stem}.png")
        curves = [r for r in group if r.switch_curve and len(r.levels) == 2]
        if curves:
            best = next((r for r in curves if r.fit_curve), curves[0])
            drawings.add(draw_switch_steps, best, name=f"switch_step_{stem}.png")
    for record in one_each_model(records):
        model, curve = record.model, record.perplexity_curve
        drawings.add(draw_perplexity, curve, record.tolerance, model, name=f"perplexity_{model}.png")
        texts.append(f"## {model}, perplexity\n\n{perplexity_table(curve, record.tolerance)}\n\n{PERPLEXITY}")
    drawings.draw()
    if missing:
        rows = [[cell.command, " ".join(cell.reason.split()).replace("|", "/")] for cell in missing]
        texts.append(f"## Missing\n\n{markdown_table(['filled by', 'why it is missing'], rows)}")
    text = "\n\n".join(texts) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    figures = "".join(f", {f.name}" for f in drawings.paths) + (" (and .pdf)" if drawings.paths else "")
    log.info("\n%s\nwritten to %s: results.csv, table.md%s", text, out, figures)
    return text


def report(overrides: Sequence[str], out: Path | None = None) -> list[Missing]:
    """Write the report of the grid behind ``overrides``; missing cells are named and returned.

    ``out`` is ``outputs/paper/<run_name>`` unless given; an experiment's ``run_name`` is its own name.
    """
    cells, configs = compose_grid(overrides)
    out = out or PAPER / configs[0].run_name
    done = report_cells(cells, configs, out)
    commands = commands_of(overrides, done.missing)
    if len(done.missing) > 1:
        log.warning("all that is missing at once: %s", commands[0])
    send(out, configs[0].run_name, commands)
    return done.missing


def send(out: Path, title: str, commands: Sequence[str]) -> None:
    """The report as files to send: CSV and LaTeX of each table, and one page with the commands that make it again."""
    if not (out / "table.md").exists():
        return
    page = export(out, title, commands, versions())
    log.info("to send to somebody: %s; every table also as CSV and LaTeX beside it", page)


def commands_of(overrides: Sequence[str], missing: Sequence[Missing]) -> list[str]:
    """What makes a grid, what reports it, and what fills each of its missing cells."""
    given = shlex.join(overrides)
    sweeps = "" if any(o.startswith("experiment=") for o in overrides) else "-m "
    commands = [f"python pipelines/run.py {sweeps}{given}", f"python pipelines/report.py {given}"]
    return commands + [f"{cell.command}  # missing: {cell.reason}" for cell in missing]


def versions() -> dict[str, str]:
    """What made a report: this code, and what it stands on."""
    packages = ("torch", "transformers", "numpy", "hydra-core", "matplotlib")
    return {
        "pmpd": code_version(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def report_cells(
    cells: Sequence[Sequence[str]], configs: Sequence[Config], out: Path, errors: Sequence[str] | None = None
) -> Collected:
    """Write a grid's report: of cells from the store, or of the grid's machines alone, as ``report`` says.

    ``errors`` are those of :func:`collect`.
    """
    if configs[0].report is ReportKind.npu:
        write_npu_report([npu_of(config.hardware) for config in configs], out)
        return Collected([], [])
    if configs[0].report is ReportKind.gpu:
        return Collected([], _report_gpu(cells, configs, out))
    done = collect(cells, configs, errors)
    write_report([record for _, record in done.found], out, done.missing)  # of no cell too: an older one would mislead
    _say_missing(done.missing)
    return done


def _say_missing(missing: Sequence[Missing]) -> None:
    for cell in missing:
        log.warning("missing: %s\n  fill it with: %s", cell.reason, cell.command)


def _command(overrides: Sequence[str]) -> str:
    """What fills the cell of ``overrides``; an experiment would sweep without being told not to."""
    alone = " hydra.mode=RUN" if any(o.startswith("experiment=") for o in overrides) else ""
    return "python pipelines/run.py " + shlex.join(overrides) + alone


def _report_gpu(cells: Sequence[Sequence[str]], configs: Sequence[Config], out: Path) -> list[Missing]:
    found, missing = [], []
    store = Store(Path(configs[0].store))
    for overrides, config in zip(cells, configs, strict=True):
        try:
            cell = gpu_cell(config, store, reading=True)
            for node in cell.targets:
                store.verify(node, ".json")
            found.append(cell)
        except (ValueError, FileNotFoundError, StoreError) as error:
            missing.append(Missing(_command(overrides), str(error)))
    if found:
        log.info("\n%s\nwritten to %s: results.csv, table.md", write_gpu_report(found, store, out), out)
    else:
        for old in ("results.csv", "table.md", "index.html"):
            (out / old).unlink(missing_ok=True)
    _say_missing(missing)
    return missing


def main() -> int:
    """Command line: Hydra overrides, as for run.py."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    if len(overrides) != len(sys.argv) - 1:
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    try:
        with heard():
            missing = report(overrides)
    except ANSWERED as error:
        return answer(error)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
