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
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pipelines.gpu import gpu_cell, write_gpu_report
from pipelines.grid import compose_grid
from pipelines.machines import npu_of
from pipelines.plan import Cell, Planner
from pmpd.artifacts import Node, Store, StoreError, read_json
from pmpd.config import Config, ReportKind, max_new_tokens
from pmpd.records import Schedule
from pmpd.report import (
    CellRecord,
    category_table,
    draw_cells,
    draw_perplexity,
    draw_quality,
    draw_switch_steps,
    failures_line,
    linears_table,
    markdown_table,
    summary_table,
    tidy,
)
from pmpd.report.drawings import Drawings
from pmpd.report.export import export
from pmpd.report.npu import write_npu_report
from pmpd.stages import read_summary
from pmpd.stages.evaluate import RESULTS_FILE
from pmpd.tracking import code_version

log = logging.getLogger("pmpd.report")

LINEARS_CAPTION = "random weights, by the profiler's self CUDA time as in the paper"
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


def cell_records(cells: Sequence[Cell], store: Store) -> list[CellRecord]:
    """What the store holds of ``cells``.

    Raises:
        FileNotFoundError: an artifact is not there.
    """
    records = []
    for cell in cells:
        results = []
        for node in (cell.evaluation, cell.gain):
            results += [r | {"key": node.key} for r in read_json(_verified(store, node) / RESULTS_FILE)]
        results += _latency_rows(cell, store) + _linear_rows(cell, store)
        records.append(
            CellRecord(
                model=model_name(cell.config),
                task=cell.config.task.name,
                scheduler=cell.config.scheduler.name,
                prefill_bits=cell.prefill_bits,
                levels=cell.precisions.levels,
                metrics=tuple(m.value for m in cell.config.task.metrics),
                results=results,
                switch_curve=_curve(store, cell.evaluation, "switch_step"),
                fit_curve=_curve(store, cell.fit, "switch_step"),
                perplexity_curve=_curve(store, cell.search, "perplexity"),
                linears=_read_rows(store, cell.linears)[1] if cell.linears else [],
                tolerance=cell.config.budget.search_tolerance,
                note=_note(cell, store),
            )
        )
    return records


def model_name(config: Config) -> str:
    """What a table calls the model: its name, or for ``model=hf`` the last part of its path."""
    return Path(config.model.path).name if config.model.name == "hf" else config.model.name


def write_report(records: Sequence[CellRecord], out: Path, missing: Sequence[Missing] = ()) -> str:
    """Write ``results.csv``, ``table.md`` and the figures below ``out``; show the tables.

    Cells that are missing are a last table, with what the attempt to build them ended in.

    Returns:
        the tables as Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    tidy(list(records)).to_csv(out / "results.csv", index=False)
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
        text = f"## {model}, {task}\n\n{summary_table(group)}\n\n{_caption(group)}"
        if categories := category_table(group):
            text += f"\n\n{categories}"
        if group[0].linears:
            text += f"\n\nLinear layers, one input, {LINEARS_CAPTION}:\n\n{linears_table(group[0].linears)}"
        texts.append(text)
        stem = f"{model}_{task}"
        drawings.draw(draw_quality, group, name=f"quality_{stem}.png")
        if len(group) > MANY:
            drawings.draw(draw_cells, group, name=f"cells_{stem}.png")
        curves = [r for r in group if r.switch_curve and len(r.levels) == 2]
        if curves:
            best = next((r for r in curves if r.fit_curve), curves[0])
            drawings.draw(draw_switch_steps, best, name=f"switch_step_{stem}.png")
    for model in dict.fromkeys(r.model for r in records):
        record = next(r for r in records if r.model == model)
        drawings.draw(draw_perplexity, record.perplexity_curve, record.tolerance, model, name=f"perplexity_{model}.png")
    drawings.close()
    if missing:
        rows = [[cell.command, " ".join(cell.reason.split()).replace("|", "/")] for cell in missing]
        texts.append(f"## Missing\n\n{markdown_table(['filled by', 'why it is missing'], rows)}")
    text = "\n\n".join(texts) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    log.info(
        "\n%s\nwritten to %s: results.csv, table.md, %s (and .pdf)",
        text,
        out,
        ", ".join(f.name for f in drawings.paths),
    )
    return text


def report(overrides: Sequence[str], out: Path | None = None) -> list[Missing]:
    """Write the report of the grid behind ``overrides``; missing cells are named and returned.

    ``out`` is ``outputs/paper/<run_name>`` unless given; an experiment's ``run_name`` is its own name.
    """
    cells, configs = compose_grid(overrides)
    out = out or PAPER / configs[0].run_name
    done = report_cells(cells, configs, out)
    send(out, configs[0].run_name, overrides, done.missing)
    return done.missing


def send(out: Path, title: str, overrides: Sequence[str], missing: Sequence[Missing]) -> None:
    """The report as files to send: CSV and LaTeX of each table, and one page with the commands that make it again."""
    if not (out / "table.md").exists():
        return
    given = shlex.join(overrides)
    sweeps = "" if any(o.startswith("experiment=") for o in overrides) else "-m "
    commands = [f"python pipelines/run.py {sweeps}{given}", f"python pipelines/report.py {given}"]
    commands += [f"{cell.command}  # missing: {cell.reason}" for cell in missing]
    page = export(out, title, commands, versions())
    log.info("to send to somebody: %s; every table also as CSV and LaTeX beside it", page)


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
                _verified(store, node)
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
        missing = report(overrides)
    except (ValueError, StoreError, HydraException, OmegaConfBaseException) as error:
        log.error("error: %s", error)
        return 1
    return 1 if missing else 0


def _verified(store: Store, node: Node) -> Path:
    try:
        return store.verify(node, ".json")
    except FileNotFoundError:
        raise FileNotFoundError(f"{node.stage} {node.key} is not in the store") from None


def _curve(store: Store, node: Node | None, name: str) -> list[dict[str, Any]]:
    return read_summary(_verified(store, node))["curves"].get(name, []) if node is not None else []


def _read_rows(store: Store, node: Node) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A timing artifact: what was timed and where, and its rows."""
    timing = read_json(_verified(store, node) / RESULTS_FILE)
    return timing, timing.pop("rows")


def _latency_rows(cell: Cell, store: Store) -> list[dict[str, Any]]:
    timing, rows = _read_rows(store, cell.latency)
    where = f"on {timing['machine']}; {timing['engine']}; {timing['weights']}"
    return [
        {
            "quantity": f"latency_{row['bits']}_bits",
            "unit": f"ms a decode step at {row['context_tokens']} tokens, median and 10 % and 90 % quantiles, {where}",
            "value": row["median_ms"],
            "ci_low": row["p10_ms"],
            "ci_high": row["p90_ms"],
            "n": row["num_steps"],
            "key": cell.latency.key,
        }
        for row in rows
    ]


def _linear_rows(cell: Cell, store: Store) -> list[dict[str, Any]]:
    if cell.linears is None:
        return []
    timing, rows = _read_rows(store, cell.linears)
    return [
        {
            "quantity": f"linear_{row['out_features']}x{row['in_features']}_{row['bits']}_bits_{cache}",
            "unit": f"us of self CUDA time a forward, mean, {label}, on {timing['machine']}; {timing['weights']}",
            "value": row[f"{cache}_us"],
            "ci_low": None,
            "ci_high": None,
            "n": row["forwards"],
            "key": cell.linears.key,
        }
        for row in rows
        for cache, label in (("hot", "weights hot in the L2 cache"), ("flushed", "L2 cache flushed"))
    ]


def _note(cell: Cell, store: Store) -> str:
    if cell.fit is not None:
        metrics = read_summary(_verified(store, cell.fit))["metrics"]
        steps = ", ".join(map(str, Schedule.parse(metrics["schedule"]).switch_steps))
        found = "" if metrics["lossless"] else "no candidate was lossless, so the last; "
        return (
            f"switch step {steps} of at most {max_new_tokens(cell.config)}, fitted on {metrics['n']} validation "
            f"samples with tolerance {cell.config.scheduler.tolerance:g} ({found}the smallest drop from high that they "
            f"would have shown: {metrics['detectable_drop']:.1f})"
        )
    if cell.dense_sparse is not None:
        metrics = read_summary(_verified(store, cell.dense_sparse))["metrics"]
        assert cell.config.scheduler.target is not None
        dense, share = metrics["dense_bits"], metrics["outlier_share"]
        return (
            f"prefill and decoding at {dense} bits and {share:.2%} outliers: {dense + metrics['outlier_bits']:.2f} "
            f"bits with indices, {dense + metrics['nominal_outlier_bits']:.2f} by the paper's accounting; matched to "
            f"{metrics['target_bits']:.2f}, {cell.config.scheduler.target.name}'s average; uniform precisions and "
            "schedules count codes alone"
        )
    if cell.training is not None:
        metrics = read_summary(_verified(store, cell.training))["metrics"]
        return (
            f"trained on {metrics['num_train']} seed prompts; accuracy on {metrics['num_holdout']} held out "
            f"{metrics['holdout_accuracy']:.2f}, of always saying the commonest class "
            f"{metrics['majority_accuracy']:.2f}"
        )
    return ""


def _caption(group: Sequence[CellRecord]) -> str:
    high, low = group[0].levels[0], group[0].levels[-1]
    gain = next((r for kind in ("npu", "gpu") if (r := group[0].find(f"{kind}_decode_throughput"))), None)
    timings = [r for r in group[0].results if r["quantity"].startswith("latency_")]
    lines = [
        f"high is uniform {high} bits, low uniform {low}, both prefill included. agreement: ROUGE-L with the model's "
        "own fp16 output. Intervals: 95 % bootstrap over samples; differences are paired.",
    ]
    lines += [f"{r.scheduler}: {r.note}." for r in group if r.note]
    if bertscore := group[0].find("bertscore"):
        lines.append(f"BERTScore: {bertscore['unit']}.")
    lines.append(failures_line(group))
    if gain:
        lines.append(f"Gain: {gain['unit']}.")
    for unit in dict.fromkeys(r["unit"] for r in timings):
        steps = ", ".join(f"{r['quantity'].split('_')[1]} bits {r['value']:.3g}" for r in timings if r["unit"] == unit)
        lines.append(f"Measured, {unit}: {steps}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
