"""The words beside a table: how each schedule was chosen, and what the numbers are.

Reads what the store and the records say; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.plan import Cell
from pmpd.artifacts import Node, Store
from pmpd.config import max_new_tokens
from pmpd.records import Schedule
from pmpd.report import CellRecord, failures_line
from pmpd.stages import read_summary

LINEARS = "Linear layers, one input, random weights, by the profiler's self CUDA time as in the paper"
"""Over the table of their times."""
PERPLEXITY = (
    "Of plain text, over fp16's of the same windows: 95 % bootstrap intervals of the paired difference; detectable is "
    "the smallest rise that these windows would have shown four times in five. Whether a precision is lossless is "
    "decided on the point estimate: it and every higher one within the tolerance."
)
"""Under the table of the precision search."""


def note(cell: Cell, store: Store) -> str:
    """How the cell's schedule was chosen, in a phrase; empty where nothing was to choose.

    Raises:
        FileNotFoundError: what it was chosen by is not in the store.
    """
    if cell.fit is not None:
        metrics = _metrics(store, cell.fit)
        steps = ", ".join(map(str, Schedule.parse(metrics["schedule"]).switch_steps))
        found = "" if metrics["lossless"] else "no candidate was lossless, so the last; "
        return (
            f"switch step {steps} of at most {max_new_tokens(cell.config)}, fitted on {metrics['n']} validation "
            f"samples with tolerance {cell.config.scheduler.tolerance:g} ({found}the smallest drop from high that they "
            f"would have shown: {metrics['detectable_drop']:.1f})"
        )
    if cell.dense_sparse is not None:
        metrics = _metrics(store, cell.dense_sparse)
        assert cell.config.scheduler.target is not None
        dense, share = metrics["dense_bits"], metrics["outlier_share"]
        return (
            f"prefill and decoding at {dense} bits and {share:.2%} outliers: {dense + metrics['outlier_bits']:.2f} "
            f"bits with indices, {dense + metrics['nominal_outlier_bits']:.2f} by the paper's accounting; matched to "
            f"{metrics['target_bits']:.2f}, {cell.config.scheduler.target.name}'s average; uniform precisions and "
            "schedules count codes alone"
        )
    if cell.training is not None:
        metrics = _metrics(store, cell.training)
        return (
            f"trained on {metrics['num_train']} seed prompts; accuracy on {metrics['num_holdout']} held out "
            f"{metrics['holdout_accuracy']:.2f}, of always saying the commonest class "
            f"{metrics['majority_accuracy']:.2f}"
        )
    return ""


def caption(group: Sequence[CellRecord]) -> str:
    """What the numbers of a table are, a line each: of the cells of one model and task."""
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


def _metrics(store: Store, node: Node) -> dict[str, Any]:
    metrics: dict[str, Any] = read_summary(store.verify(node, ".json"))["metrics"]
    return metrics
