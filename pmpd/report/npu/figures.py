"""Figures of the NPU report: the paper's bars beside ours, and one for each thing that the paper does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pmpd.hardware.npu import NPU
from pmpd.report.figures import COLOURS, STYLE, save
from pmpd.report.npu.sweeps import CONTEXT_TOKENS, NEW_TOKENS, Case, machine_gain

TASKS = {"cnndm": "CNN/DM", "dialogsum": "DialogSum", "iwslt": "IWSLT"}
MODELS = {"vicuna7b": "Vicuna-7B", "mobilellama": "MobileLLaMA", "phi1_5": "Phi-1.5", "llama2_7b": "LLaMA-2-7B"}
DASHES: tuple[Any, ...] = ("-", "--", ":")
LINE_COLOURS = ("#b2182b", "#2166ac", "#1b7837", "#e08214", "#762a83", "#555555", "#8c510a")
GAINS = (("decode_speedup", "times fp16"), ("decode_gain_over_high", "times uniform high"))


def draw_bars(results: pd.DataFrame, path: Path) -> None:
    """The paper's bar chart beside ours; hollow: agreement shows nothing, its bits were solved from that bar."""
    bars = results[(results.quantity == "decode_throughput") & results.task.isin(list(TASKS))]
    labels = results[results.quantity == "decode_speedup"].set_index(["task", "model", "schedule"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        tasks = [t for t in TASKS if t in set(bars.task)]
        widths = [bars[bars.task == t].model.nunique() for t in tasks]
        for axes, task in zip(
            figure.subplots(1, len(tasks), width_ratios=widths, squeeze=False)[0], tasks, strict=True
        ):
            models = list(dict.fromkeys(bars[bars.task == task].model))
            for m, model in enumerate(models):
                own = bars[(bars.task == task) & (bars.model == model)]
                for s, row in enumerate(own.itertuples()):
                    x = 5 * m + s
                    colour = COLOURS[row.schedule]
                    axes.bar(x - 0.2, row.published, 0.38, color=colour, alpha=0.35)
                    filled = "none" if "circular" in row.confidence else colour
                    axes.bar(x + 0.2, row.value, 0.38, color=filled, edgecolor=colour)
                    if row.schedule != "fp16":
                        label = labels.loc[(task, model, row.schedule)]
                        text = f"{label.published:.1f}\n{label.value:.1f}"
                        axes.text(x, max(row.published, row.value) + 0.8, text, ha="center", fontsize=7)
            axes.set_xticks([5 * m + 1.5 for m in range(len(models))], [MODELS[m] for m in models])
            axes.set_title(TASKS[task], fontsize=10)
            axes.set_ylim(0, 80)
            axes.tick_params(axis="x", length=0)
        figure.axes[0].set_ylabel("decode tokens/s, output head left out")
        handles = [mpl.patches.Patch(color=COLOURS[s], label=s) for s in ("fp16", "high", "static", "learned")]
        handles += [
            mpl.patches.Patch(color="#555555", alpha=0.35, label="left: paper"),
            mpl.patches.Patch(color="#555555", label="right: model"),
            mpl.patches.Patch(facecolor="none", edgecolor="#555555", label="right: model, bits solved from that bar"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=7, frameon=False)
        note = "numbers: times fp16, the paper's above the model's; one context a task, fitted to its uniform bars"
        figure.supxlabel(note, fontsize=8, color="#555555")
        save(figure, path)


def draw_variants(sweeps: pd.DataFrame, title: str, path: Path) -> None:
    """Grouped bars of both gains by model, one bar a variant, with its number."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (quantity, unit) in zip(figure.subplots(1, 2), GAINS, strict=True):
            rows = sweeps[sweeps.quantity == quantity]
            cases = _cases(rows)
            slots = rows.groupby(["hardware", "model"]).variant.nunique().max() + 1
            colours: dict[str, str] = {}
            for c, (hardware, model, _) in enumerate(cases):
                own = rows[(rows.hardware == hardware) & (rows.model == model)]
                for v, row in enumerate(own.itertuples()):
                    name = row.variant
                    colour = colours.setdefault(name, LINE_COLOURS[len(colours) % len(LINE_COLOURS)])
                    axes.bar(slots * c + v, row.value, 0.9, color=colour, label=name)
                    axes.text(slots * c + v, row.value, f"{row.value:.2f}", ha="center", va="bottom", fontsize=6)
            middle = (slots - 2) / 2
            names = [f"{MODELS.get(model, model)}\n{bits} bits\n{hardware}" for hardware, model, bits in cases]
            axes.set_xticks([slots * c + middle for c in range(len(cases))], names, fontsize=7)
            axes.tick_params(axis="x", length=0)
            axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
            axes.set_ylabel(f"decode throughput, {unit}")
            axes.margins(y=0.12)
        handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel(title, fontsize=8, color="#555555")
        save(figure, path)


def draw_lines(sweeps: pd.DataFrame, label: str, title: str, path: Path) -> None:
    """Both gains against a swept number, a colour a model, a dash a variant."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (quantity, unit) in zip(figure.subplots(1, 2), GAINS, strict=True):
            rows = sweeps[sweeps.quantity == quantity]
            _lines(axes, rows)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlabel(label)
            axes.set_ylabel(f"decode throughput, {unit}")
            axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
            axes.set_ylim(bottom=0.9)
        figure.legend(handles=_line_handles(sweeps), loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel(title, fontsize=8, color="#555555")
        save(figure, path)


def draw_prefill(sweeps: pd.DataFrame, published: tuple[float, float], path: Path) -> None:
    """End-to-end time that a prefill above the low bits adds, against the prompt's length; a panel a model."""
    cases = list(dict.fromkeys(zip(sweeps.hardware, sweeps.model, strict=True)))
    variants, precisions = list(dict.fromkeys(sweeps.variant)), sorted(set(sweeps.weight_bits))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * max(len(cases), 2), 3.8), layout="constrained")
        panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
        for axes, (hardware, model) in zip(panels, cases, strict=True):
            own = sweeps[(sweeps.hardware == hardware) & (sweeps.model == model)]
            for (variant, bits), rows in own.groupby(["variant", "weight_bits"], sort=False):
                dash, colour = DASHES[variants.index(variant)], LINE_COLOURS[precisions.index(bits)]
                axes.plot(rows["at"], rows.value, dash, color=colour, linewidth=1.4)
            axes.axhspan(*published, color="#a6dba0", alpha=0.6, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(-0.02, 100)
            axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
            axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlabel("prompt tokens")
            axes.set_title(f"{MODELS.get(model, model)} on {hardware}", fontsize=9)
        panels[0].set_ylabel(f"added to the time at low bits,\n% of prefill + {NEW_TOKENS} tokens")
        handles = [
            Line2D([], [], color=LINE_COLOURS[i], label=f"prefill at {b} bits") for i, b in enumerate(precisions)
        ]
        handles += [Line2D([], [], color="black", linestyle=DASHES[i], label=v) for i, v in enumerate(variants)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        note = "green: the paper's 0.07 to 1.05 % (Vicuna-7B, CNN/DM). Small buffers read weights or activations again"
        figure.supxlabel(note, fontsize=8, color="#555555")
        save(figure, path)


def draw_machines(case: Case, npus: list[NPU], path: Path) -> None:
    """Gain over fp16 on 100,000 machines like ``case.npu``; below the ridge arithmetic binds and bits gain less.

    ``npus`` are marked at what they reach; where they differ otherwise (efficiency of the KV cache), the map does not.
    """
    macs, bandwidth = np.geomspace(256, 65536, 250), np.geomspace(4e9, 4e12, 400)
    gain = machine_gain(case, macs, bandwidth)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.subplots()
        x, y = bandwidth / 1e9, macs * case.npu.clock_hz / 1e12
        mesh = axes.pcolormesh(x, y, gain, cmap="viridis", vmin=1, shading="auto", rasterized=True)
        lines = axes.contour(x, y, gain, levels=[2, 4, 6], colors="white", linewidths=0.8)
        for npu in npus:
            reached = npu.bandwidth_bytes_s * npu.bandwidth_efficiency * npu.region_efficiency / 1e9
            peak = npu.num_macs * npu.clock_hz * npu.region_efficiency / 1e12
            axes.plot(reached, peak, "o", color="white", markeredgecolor="black")
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
            axes.annotate(npu.name, (reached, peak), (7, 5), textcoords="offset points", fontsize=7, bbox=box)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bandwidth reached, GB/s")
        axes.set_ylabel("multiply-accumulates, 10^12/s")
        figure.colorbar(mesh, label=f"{case.low}-bit decoding, times fp16").add_lines(lines)
        name = MODELS.get(case.model, case.model)
        axes.set_title(f"{name}, {CONTEXT_TOKENS} tokens of context, head left out", fontsize=9)
        save(figure, path)


def _lines(axes: Axes, rows: pd.DataFrame) -> None:
    variants = list(dict.fromkeys(rows.variant))
    for c, (hardware, model, _) in enumerate(_cases(rows)):
        for v, variant in enumerate(variants):
            own = rows[(rows.hardware == hardware) & (rows.model == model) & (rows.variant == variant)]
            # Later lines are thinner, so that one beneath another still shows.
            axes.plot(own["at"], own.value, DASHES[v], color=LINE_COLOURS[c], linewidth=max(2.8 - 0.7 * c, 0.8))


def _line_handles(rows: pd.DataFrame) -> list[Line2D]:
    models = [
        Line2D([], [], color=LINE_COLOURS[c], linewidth=2, label=f"{MODELS.get(model, model)} at {bits} bits")
        for c, (_, model, bits) in enumerate(_cases(rows))
    ]
    variants = [
        Line2D([], [], color="black", linestyle=DASHES[v], label=name)
        for v, name in enumerate(dict.fromkeys(rows.variant))
    ]
    return models + variants


def _cases(rows: pd.DataFrame) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys(zip(rows.hardware, rows.model, rows.weight_bits, strict=True)))
