"""The paper's GPU table from recorded times: linear layers under its schedules, over fp16 and over uniform precision.

    python benchmarks/gpu_schedules.py                             the H100's times in docs/results/gpu
    python benchmarks/gpu_schedules.py --times results.csv         those that experiment=gpu wrote elsewhere

Needs no GPU. A schedule takes the times of its two precisions, as often as its average bits say. The bits are the
paper's, as far as they are known (``pmpd/report/published/npu.csv``); those solved from its NPU bars are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from pmpd.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "docs" / "results" / "gpu" / "results.csv"
BITS = ROOT / "pmpd" / "report" / "published" / "npu.csv"
PUBLISHED = "The paper, its layers on an RTX 4090 and an A40, hot: 1.4 to 12.2 times fp16, up to 1.41 times uniform."


def schedules() -> pd.DataFrame:
    """Average bits of the paper's schedules by model and task, with its high precision beside."""
    rows = pd.read_csv(BITS)
    high = rows[rows.schedule == "high"].drop_duplicates(["model", "task"]).set_index(["model", "task"]).weight_bits
    known = rows[rows.schedule.isin(["static", "learned"]) & ~rows.bits_source.str.contains("solved|label")]
    known = known.drop_duplicates(["model", "task", "schedule"])
    return known.assign(high=[int(high[m, t]) for m, t in zip(known.model, known.task, strict=True)])


def table(times: pd.DataFrame) -> str:
    """A row a schedule: the range over the model's layer shapes, and a decode step, of what it gains."""
    linear = times[times.op == "linear"]
    body = []
    for row in schedules().itertuples():
        own = linear[linear.model == row.model]
        if own.empty:
            continue
        share = row.weight_bits - (row.high - 1)
        cells = [row.model, row.task, row.schedule, f"{row.weight_bits:.2f}"]
        for cache in ("hot", "flushed"):
            us = own[own.cache == cache].pivot_table(
                index=["out_features", "in_features"], columns="bits", values="value"
            )
            mixed = share * us[row.high] + (1 - share) * us[row.high - 1]
            for base in (16, row.high):
                gain = us[base] / mixed
                cells.append(f"{gain.min():.2f} to {gain.max():.2f}")
        step = times[(times.op == "decode step") & (times.model == row.model)].set_index("bits").value
        mixed_ms = share * step[row.high] + (1 - share) * step[row.high - 1] if len(step) else None
        cells += ["-", "-"] if mixed_ms is None else [f"{step[b] / mixed_ms:.2f}" for b in (16, row.high)]
        body.append(cells)
    header = [
        "model",
        "task",
        "schedule",
        "bits",
        "hot: over fp16",
        "over uniform",
        "flushed: over fp16",
        "over uniform",
    ]
    return markdown_table([*header, "step: over fp16", "over uniform"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=Path, default=TIMES, help="results.csv of experiment=gpu")
    args = parser.parse_args()
    times = pd.read_csv(args.times)
    sys.stdout.write(f"Linear layers' times and decode steps: {', '.join(times.machine.unique())}; random weights.\n")
    sys.stdout.write(f"{PUBLISHED}\n\n{table(times)}\n")


if __name__ == "__main__":
    main()
