"""What the store holds of a cell, as the record that tables and figures are made of.

Reads results, curves and times, each checked against its digest; does not know what a table looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.notes import note
from pipelines.plan import Cell
from pmpd.artifacts import Node, Store, read_json
from pmpd.config import Config
from pmpd.report import CellRecord
from pmpd.stages import read_summary
from pmpd.stages.evaluate import RESULTS_FILE


def cell_records(cells: Sequence[Cell], store: Store) -> list[CellRecord]:
    """What the store holds of ``cells``.

    Raises:
        FileNotFoundError: an artifact is not there.
    """
    records = []
    for cell in cells:
        results = []
        for node in (cell.evaluation, cell.gain):
            results += [r | {"key": node.key} for r in read_json(store.verify(node, ".json") / RESULTS_FILE)]
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
                perplexity_curve=[r | {"key": cell.search.key} for r in _curve(store, cell.search, "perplexity")],
                linears=_read_rows(store, cell.linears)[1] if cell.linears else [],
                tolerance=cell.config.budget.search_tolerance,
                note=note(cell, store),
            )
        )
    return records


def model_name(config: Config) -> str:
    """What a table calls the model: its name, or for ``model=hf`` the last part of its path."""
    return Path(config.model.path).name if config.model.name == "hf" else config.model.name


def _curve(store: Store, node: Node | None, name: str) -> list[dict[str, Any]]:
    return read_summary(store.verify(node, ".json"))["curves"].get(name, []) if node is not None else []


def _read_rows(store: Store, node: Node) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A timing artifact: what was timed and where, and its rows."""
    timing = read_json(store.verify(node, ".json") / RESULTS_FILE)
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
