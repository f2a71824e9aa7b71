"""The table that people read: a row a cell, quality with intervals, bits, and the estimated gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pmpd.report.frame import CellRecord

TITLES = {"rouge_l": "ROUGE-L", "bertscore": "BERTScore", "bleu": "BLEU", "sacrebleu": "SacreBLEU"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary_table(records: Sequence[CellRecord]) -> str:
    """Cells of one model and task: bits, metrics with 95 % intervals, agreement, difference to high, NPU gain."""
    metrics = records[0].metrics
    header = ["scheduler", "prefill", "average bits"]
    header += [f"{TITLES[m]} [95 %]" for m in metrics]
    header += [f"{TITLES[metrics[0]]} - high", "agreement [95 %]", "NPU tokens/s", "NPU speed-up", "n"]
    rows = []
    for r in records:
        first = r.find(metrics[0])
        rows.append(
            [
                r.scheduler,
                str(r.prefill_bits),
                _number(r.find("average_bits"), 2),
                *(_interval(r.find(m), 1) for m in metrics),
                _interval(r.find(f"{metrics[0]} minus high"), 1, signed=True),
                _interval(r.find("agreement"), 1),
                _number(r.find("npu_decode_throughput"), 1),
                _number(r.find("npu_decode_speedup"), 2, "x"),
                str(first["n"]) if first else "-",
            ]
        )
    return markdown_table(header, rows)


def _number(row: dict[str, Any] | None, digits: int, suffix: str = "", signed: bool = False) -> str:
    if row is None or row["value"] is None or math.isnan(row["value"]):
        return "-"
    return f"{row['value']:{'+' if signed else ''}.{digits}f}{suffix}"


def _interval(row: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    if row is None:
        return "-"
    low, high = (f"{row[side]:{'+' if signed else ''}.{digits}f}" for side in ("ci_low", "ci_high"))
    return f"{_number(row, digits, signed=signed)} [{low}, {high}]"
