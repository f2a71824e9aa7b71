"""The table that people read: a row a cell, quality with intervals, bits, and the estimated gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pmpd.records import FP16_BITS
from pmpd.report.frame import CellRecord

TITLES = {"rouge_l": "ROUGE-L", "bertscore": "BERTScore", "bleu": "BLEU", "sacrebleu": "SacreBLEU"}


GAINS = (
    ("NPU tokens/s", "npu_decode_throughput", 1, ""),
    ("NPU speed-up", "npu_decode_speedup", 2, "x"),
    ("GPU tokens/s", "gpu_decode_throughput", 1, ""),
    ("GPU speed-up", "gpu_decode_speedup", 2, "x"),
    ("GPU over high", "gpu_decode_speedup_over_high", 2, "x"),
)
"""Columns for what the cells' hardware gives: title, quantity, digits, suffix."""

BITS = (("by token", "average_bits_tokens", 2, ""), ("by time", "average_bits_time", 2, ""))
"""Average bits weighted otherwise than by sequence, which is the paper's."""

FAILURES = (
    ("shortened_prompts", "prompts cut to the context"),
    ("unended_answers", "answers cut off by max_new_tokens"),
    ("empty_answers", "empty answers"),
    ("no_decode_step", "samples without a decode step"),
)
"""What went less than well, counted."""


def linears_table(rows: Sequence[dict[str, Any]]) -> str:
    """Linear layers as the paper times them: microseconds, and times 16 bits, hot in the cache and flushed from it."""
    precisions = sorted({row["bits"] for row in rows}, reverse=True)
    header = ["out x in", "L2 cache", *(f"{bits} bits us" for bits in precisions)]
    header += [f"{bits} / {precisions[0]}" for bits in precisions[1:]]
    body = []
    for shape in dict.fromkeys((row["out_features"], row["in_features"]) for row in rows):
        for cache in ("hot", "flushed"):
            us = {r["bits"]: r[f"{cache}_us"] for r in rows if (r["out_features"], r["in_features"]) == shape}
            ratios = [f"{us[precisions[0]] / us[bits]:.2f}x" for bits in precisions[1:]]
            body.append([f"{shape[0]} x {shape[1]}", cache, *(f"{us[b]:.1f}" for b in precisions), *ratios])
    return markdown_table(header, body)


def steps_table(rows: Sequence[dict[str, Any]]) -> str:
    """Whole decode steps: milliseconds and tokens/s at each context and precision, and times 16 bits."""
    header = ["bits", "context", "ms a token", "tokens/s", "over 16 bits"]
    base = {row["context_tokens"]: row["median_ms"] for row in rows if row["bits"] == FP16_BITS}
    body = [
        [
            str(row["bits"]),
            str(row["context_tokens"]),
            f"{row['median_ms']:.3f}",
            f"{1e3 / row['median_ms']:.1f}",
            f"{base[row['context_tokens']] / row['median_ms']:.2f}x",
        ]
        for row in rows
    ]
    return markdown_table(header, body)


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
    """Cells of one model and task: bits, metrics with 95 % intervals, agreement, difference to high, gain."""
    metrics = records[0].metrics
    bits, gains = ([c for c in columns if any(r.find(c[1]) for r in records)] for columns in (BITS, GAINS))
    header = ["scheduler", "prefill", "average bits", *(title for title, *_ in bits)]
    header += [f"{TITLES[m]} [95 %]" for m in metrics]
    header += [f"{TITLES[metrics[0]]} - high", "agreement [95 %]", *(title for title, *_ in gains), "n"]
    rows = []
    for r in records:
        first = r.find(metrics[0])
        rows.append(
            [
                r.scheduler,
                str(r.prefill_bits),
                _number(r.find("average_bits"), 2),
                *(_number(r.find(quantity), digits, suffix) for _, quantity, digits, suffix in bits),
                *(_interval(r.find(m), 1) for m in metrics),
                _interval(r.find(f"{metrics[0]} minus high"), 1, signed=True),
                _interval(r.find("agreement"), 1),
                *(_number(r.find(quantity), digits, suffix) for _, quantity, digits, suffix in gains),
                str(first["n"]) if first else "-",
            ]
        )
    return markdown_table(header, rows)


def perplexity_table(curve: Sequence[dict[str, Any]], tolerance: float) -> str:
    """Perplexity at every precision over fp16's of the same windows, and what these windows could have shown."""
    header = ["bits", "perplexity", "over fp16 [95 %]", "detectable rise", f"within {100 * tolerance:g}%", "windows"]
    body = []
    for row in sorted(curve, key=lambda row: -row["bits"]):
        low, high = (f"{100 * row[f'relative_{side}']:+.2f}" for side in ("low", "high"))
        fp16 = row["bits"] == FP16_BITS
        body.append(
            [
                str(row["bits"]),
                f"{row['perplexity']:.2f}",
                "-" if fp16 else f"{100 * row['relative']:+.2f} % [{low}, {high}]",
                "-" if fp16 else f"{100 * row['detectable_rise']:.2f} %",
                "-" if fp16 else "yes" if row["relative"] <= tolerance else "no",
                str(row["n"]),
            ]
        )
    return markdown_table(header, body)


def category_table(records: Sequence[CellRecord]) -> str:
    """The first metric of each category of samples, and its paired difference to uniform high; empty without any."""
    metric = records[0].metrics[0]
    start, end = f"{metric} of ", " minus high"
    names = [r["quantity"].removeprefix(start) for r in records[0].results if r["quantity"].startswith(start)]
    names = [name for name in names if not name.endswith(end)]
    body = [
        [
            name,
            str((record.find(start + name) or {"n": "-"})["n"]),
            record.scheduler,
            _interval(record.find(start + name), 1),
            _interval(record.find(start + name + end), 1, signed=True),
        ]
        for name in names
        for record in records
    ]
    header = ["category", "n", "scheduler", f"{TITLES[metric]} [95 %]", f"{TITLES[metric]} - high"]
    return markdown_table(header, body) if body else ""


def failures_line(records: Sequence[CellRecord]) -> str:
    """What went less than well, by scheduler, in words."""
    parts = []
    for record in records:
        found = [(row, words) for quantity, words in FAILURES if (row := record.find(quantity)) and row["value"]]
        if found:
            parts.append(f"{record.scheduler}: " + ", ".join(f"{r['value']:g} of {r['n']} {w}" for r, w in found))
    return "Counted: " + ("; ".join(parts) if parts else "no cut prompt, no cut or empty answer") + "."


def _number(row: dict[str, Any] | None, digits: int, suffix: str = "", signed: bool = False) -> str:
    if row is None or row["value"] is None or math.isnan(row["value"]):
        return "-"
    return f"{row['value']:{'+' if signed else ''}.{digits}f}{suffix}"


def _interval(row: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    if row is None:
        return "-"
    low, high = (f"{row[side]:{'+' if signed else ''}.{digits}f}" for side in ("ci_low", "ci_high"))
    return f"{_number(row, digits, signed=signed)} [{low}, {high}]"
