"""Figures: quality against average bits, perplexity against bits, quality against switch step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmpd.records import FP16_BITS
from pmpd.report.frame import CellRecord
from pmpd.report.table import TITLES

COLOURS = {"fp16": "#555555", "high": "#1b7837", "low": "#b2182b", "static": "#2166ac", "learned": "#e08214"}
OTHERS = ("#762a83", "#8c510a", "#01665e", "#c51b7d", "#66a61e", "#a6761d", "#1f78b4", "#b15928", "#fb9a99", "#000000")
"""For schedulers without a colour of their own, in the order in which they come."""

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120}


TICKS = 5
"""Intervals of a linear axis, at most: labels are most of what drawing costs (a figure takes a fifth less than at
matplotlib's nine)."""


def colours_of(records: Sequence[CellRecord]) -> dict[str, str]:
    """A colour for every scheduler."""
    others = [s for s in dict.fromkeys(r.scheduler for r in records) if s not in COLOURS]
    return COLOURS | {scheduler: OTHERS[k % len(OTHERS)] for k, scheduler in enumerate(others)}


def draw_cells(records: Sequence[CellRecord], path: Path) -> None:
    """A row a cell: the first metric, its paired difference to uniform high, agreement with fp16; with intervals."""
    metric = records[0].metrics[0]
    colours = colours_of(records)
    panels = (
        (metric, TITLES[metric]),
        (f"{metric} minus high", f"{TITLES[metric]} - high (paired)"),
        ("agreement", "agreement with own fp16 output"),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.2 + 0.26 * len(records)), layout="constrained")
        axes_row = figure.subplots(1, len(panels), sharey=True)
        for axes, (quantity, label) in zip(axes_row, panels, strict=True):
            for place, record in enumerate(records):
                if (row := record.find(quantity)) is None:
                    continue
                error = [[max(row["value"] - row["ci_low"], 0)], [max(row["ci_high"] - row["value"], 0)]]
                axes.errorbar([row["value"]], [place], xerr=error, fmt="o", color=colours[record.scheduler], capsize=2)
            if quantity.endswith("high"):
                axes.axvline(0, color="#999999", linewidth=0.8)
            axes.set_xlabel(label)
            axes.locator_params("x", nbins=TICKS)
            axes.grid(axis="x", color="#eeeeee")
        bits = [record.find("average_bits") for record in records]
        labels = [f"{r.scheduler} ({b['value']:.2f})" if b else r.scheduler for r, b in zip(records, bits, strict=True)]
        axes_row[0].set_yticks(range(len(records)), labels)
        axes_row[0].invert_yaxis()
        figure.suptitle(
            f"{records[0].model}, {records[0].task}: (average decode bits); 95 % bootstrap intervals",
            fontsize=9,
        )
        save(figure, path)


def draw_quality(records: Sequence[CellRecord], path: Path) -> None:
    """Quality against average bits for the cells of one model and task: first metric, and agreement with fp16."""
    metric = records[0].metrics[0]
    colours = colours_of(records)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, quantity, label in (
            (panels[0], metric, f"{TITLES[metric]}"),
            (panels[1], "agreement", "agreement with own fp16 output\n(ROUGE-L)"),
        ):
            for record in records:
                bits, row = record.find("average_bits"), record.find(quantity)
                if bits is None or row is None:
                    continue
                colour = colours[record.scheduler]
                if record.levels and bits["value"] == FP16_BITS:
                    axes.axhline(row["value"], color=colour, linewidth=1, linestyle="--", label="fp16 (16 bits)")
                else:
                    _point(axes, bits["value"], row, colour, record.scheduler)
            axes.set_xlabel("average decode bits")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.locator_params(nbins=TICKS)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        figure.supxlabel(
            f"{records[0].model}, {records[0].task}; bars: 95 % bootstrap intervals", fontsize=8, color="#555555"
        )
        save(figure, path)


def draw_perplexity(curve: Sequence[dict[str, Any]], tolerance: float, model: str, path: Path) -> None:
    """Perplexity at every precision beside fp16's, with the lossless band."""
    fp16 = next(r["perplexity"] for r in curve if r["bits"] == FP16_BITS)
    rows = [r for r in curve if r["bits"] != FP16_BITS]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.axhspan(
            fp16, fp16 * (1 + tolerance), color="#a6dba0", alpha=0.6, label=f"lossless (within {100 * tolerance:g}%)"
        )
        axes.axhline(fp16, color=COLOURS["fp16"], linestyle="--", linewidth=1, label="fp16")
        axes.plot([r["bits"] for r in rows], [r["perplexity"] for r in rows], "o-", color=COLOURS["static"])
        axes.set_yscale("log")
        axes.set_xticks([r["bits"] for r in rows])
        axes.set_xlabel("bits")
        axes.set_ylabel("perplexity (log)")
        axes.set_title(model, fontsize=9)
        axes.legend(frameon=False)
        save(figure, path)


def draw_switch_steps(record: CellRecord, path: Path) -> None:
    """Quality against switch step, on the test split and, where a static schedule was fitted, on validation."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for rows, label, colour, shift in (
            (record.fit_curve, "validation", "#92c5de", -0.4),
            (record.switch_curve, "test", COLOURS["static"], 0.4),
        ):
            if not rows:
                continue
            steps = np.array([r["switch_steps"][0] for r in rows]) + shift
            values = np.array([[r["value"], r["ci_low"], r["ci_high"]] for r in rows])
            axes.errorbar(
                steps,
                values[:, 0],
                yerr=np.abs(values[:, 1:] - values[:, :1]).T,
                fmt="o-",
                color=colour,
                capsize=2,
                label=label,
            )
        axes.set_xlabel(f"switch step from {record.levels[0]} to {record.levels[-1]} bits")
        axes.set_ylabel(TITLES[record.metrics[0]])
        axes.set_ylim(bottom=0)
        axes.locator_params(nbins=TICKS)
        axes.set_title(f"{record.model}, {record.task}", fontsize=9)
        axes.legend(frameon=False)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write ``path`` as PNG and as PDF, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)  # once, and without the drawing of it all that a canvas does for a layout
    figure.set_layout_engine(None)
    figure.savefig(
        path.with_suffix(".png"), dpi=160, pil_kwargs={"compress_level": 1}
    )  # a sixth larger, a tenth sooner
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def _point(axes: Axes, bits: float, row: dict[str, Any], colour: str, label: str) -> None:
    below, above = max(row["value"] - row["ci_low"], 0), max(row["ci_high"] - row["value"], 0)
    axes.errorbar([bits], [row["value"]], yerr=[[below], [above]], fmt="o", color=colour, capsize=3, label=label)
