"""Writes the NPU report: results, sweeps, tables and figures below one folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pmpd.hardware.npu import NPU
from pmpd.report.npu.figures import draw_bars, draw_lines, draw_machines, draw_prefill, draw_variants
from pmpd.report.npu.published import read_published
from pmpd.report.npu.sweeps import CONTEXT_TOKENS, cases, sweep
from pmpd.report.npu.tables import tables
from pmpd.report.npu.validation import ceilings, compare

log = logging.getLogger("pmpd.report")

CONTEXT = f"{CONTEXT_TOKENS} tokens of context (CNN/DM)"


def write_npu_report(npus: Sequence[NPU], out: Path) -> str:
    """Write ``results.csv``, ``sweeps.csv``, ``table.md`` and the figures below ``out``; show the tables.

    Returns:
        the tables as Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    compared = compare(npus)
    results = pd.concat([ceilings(npus), compared] if len(compared) else [ceilings(npus)], ignore_index=True)
    results.to_csv(out / "results.csv", index=False)
    sweeps = sweep(npus)
    sweeps.to_csv(out / "sweeps.csv", index=False)
    text = tables(results, sweeps)
    (out / "table.md").write_text(text, encoding="utf-8")

    def rows(name: str) -> pd.DataFrame:
        return sweeps[sweeps["sweep"] == name]

    if (results.schedule == "static").any():
        draw_bars(results, out / "bars.png")
    draw_variants(rows("head"), "what is read for a token beside the blocks' weights; no KV cache", out / "head.png")
    draw_variants(rows("kv_cache"), f"bits of the KV cache; {CONTEXT}, head not counted", out / "kv_cache.png")
    title = f"planes that a step at low bits reads; {CONTEXT}, KV cache at 8 bits, head not counted"
    draw_variants(rows("layout"), title, out / "layout.png")
    draw_lines(rows("context"), "tokens of context", "one sequence, head not counted", out / "context.png")
    title = "sequences decoded together"
    draw_lines(rows("batch"), title, "KV cache at 8 bits, head not counted", out / "batch.png")
    overheads = [p.value for p in read_published() if p.quantity == "prefill_overhead"]
    draw_prefill(rows("prefill"), (min(overheads), max(overheads)), out / "prefill.png")
    draw_machines(cases(npus)[0], list(npus), out / "machines.png")
    figures = ", ".join(sorted(p.name for p in out.glob("*.png")))
    log.info("\n%s\nwritten to %s: results.csv, sweeps.csv, table.md, %s (and .pdf)", text, out, figures)
    return text
