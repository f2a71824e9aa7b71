"""The NPU report's tables in Markdown: ceilings, what was published beside the model, what changes the gain."""

from __future__ import annotations

import pandas as pd

from pmpd.report.table import markdown_table

BARS, OVERHEADS = "the paper's bars", "the paper's prefill overheads"
NOTES = {
    BARS: " Contexts are not published: one a task is fitted to the uniform bars (high). Vicuna's fp16 bars are 2.3 "
    "tokens/s read from pixels of an axis to 80; the next table has fp16 without them. Circular: the average bits were "
    "solved from that bar.",
    OVERHEADS: "\n\nThe paper's range is over precisions that we do not know; its ends are set against 3 and 16 bits.",
}

OVER_FP16, OVER_HIGH = "decode_speedup", "decode_gain_over_high"


def tables(results: pd.DataFrame, sweeps: pd.DataFrame) -> str:
    """Everything that was compared, then the gain under every changed assumption."""
    ceilings = results[results.confidence == "formula"]
    compared = results[results.published.notna()]
    parts = [
        "## Ceilings: no context, no tables\n\n" + _ceilings(ceilings),
        *(f"## Against {title}\n\n{_compared(rows)}{NOTES.get(title, '')}" for title, rows in _groups(compared)),
        "## What the paper does not say: the gain of decoding at the pair's low bits\n\n" + _gains(sweeps),
    ]
    return "\n\n".join(parts) + "\n"


def _ceilings(rows: pd.DataFrame) -> str:
    bits = sorted(set(rows.weight_bits), reverse=True)
    header = ["hardware", "model", "head", *(f"{b:g} bits" for b in bits), *(f"{b:g} / fp16" for b in bits[1:])]
    lines = []
    for (hardware, model, head), own in rows.groupby(["hardware", "model", "head"], sort=False):
        rate, gain = (
            own[own.quantity == q].set_index("weight_bits").value for q in ("decode_throughput", "decode_speedup")
        )
        lines.append(
            [hardware, model, head, *(f"{rate[b]:#.4g}" for b in bits), *(f"{gain[b]:.2f}x" for b in bits[1:])]
        )
    return markdown_table(header, lines) + "\n\nDecode tokens/s; the head counted at the hardware's head_bits."


def _groups(compared: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    flightllm = compared.hardware == "flightllm_vhk158"
    groups = []
    for title, mask in (
        (BARS, ~flightllm & compared.quantity.isin(["decode_throughput"])),
        ("fp16 as uniform bar over printed label", compared.quantity == "decode_throughput_by_label"),
        ("the paper's printed gains", ~flightllm & compared.quantity.isin([OVER_FP16, OVER_HIGH])),
        (OVERHEADS, compared.quantity == "prefill_overhead"),
        ("FlightLLM's published times", flightllm),
    ):
        if mask.any():
            groups.append((title, compared[mask]))
    return groups


def _compared(rows: pd.DataFrame) -> str:
    header = ["model", "task", "schedule", "bits", "context", "quantity", "ours", "published", "off", "confidence"]
    lines = []
    for r in rows.itertuples():
        quantity = f"{r.quantity}, {r.unit}"
        off = f"{100 * (r.value / r.published - 1):+.1f} %" if r.value else f"{r.value - r.published:+.2f} points"
        values = [f"{r.value:#.4g}", f"{r.published:g}", off, r.confidence]
        lines.append([r.model, r.task, r.schedule, f"{r.weight_bits:g}", f"{r.context_tokens:g}", quantity, *values])
    percent = (100 * (rows.value / rows.published - 1)).abs()
    if not rows.value.all():
        return markdown_table(header, lines)
    circular = rows.confidence.str.contains("circular")
    summary = f"Largest difference {percent[~circular].max():.1f} %"
    if circular.any():
        summary += f"; beside that {circular.sum()} circular rows, {percent[circular].max():.1f} %"
    return f"{markdown_table(header, lines)}\n\n{summary}."


def _gains(sweeps: pd.DataFrame) -> str:
    rows = sweeps[sweeps["sweep"] != "prefill"]
    cases = list(dict.fromkeys(zip(rows.hardware, rows.model, rows.weight_bits, strict=True)))
    header = ["changed", "to", *(f"{model}, {bits} bits, {hardware}" for hardware, model, bits in cases)]
    wanted = {"context": (1024, 4096, 32768), "batch": (1, 8, 32)}
    table: dict[tuple[str, str], dict[tuple[str, str, int], str]] = {}
    for (name, hardware, model, bits, variant), own in rows.groupby(
        ["sweep", "hardware", "model", "weight_bits", "variant"], sort=False
    ):
        for at in _nearest(own["at"], wanted.get(name)):
            here = own[own["at"] == at].set_index("quantity").value
            text = f"{here[OVER_FP16]:.2f} ({here[OVER_HIGH]:.2f})"
            to = f"{variant}, {at:g}" if name in wanted else variant
            table.setdefault((name, to), {})[hardware, model, bits] = text
    lines = [[name, to, *(cells.get(case, "-") for case in cases)] for (name, to), cells in table.items()]
    note = "Times fp16 (times uniform high). Context: none for the head, else 1100 tokens unless changed."
    return f"{markdown_table(header, lines)}\n\n{note}"


def _nearest(at: pd.Series, wanted: tuple[int, ...] | None) -> list[float]:
    values = sorted(set(at))
    return values if wanted is None else [min(values, key=lambda v: abs(v - w)) for w in wanted]
