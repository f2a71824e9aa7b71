"""How many average bits progressive decoding needs with each quantiser: agreement with 16 bits, by schedule.

    python benchmarks/quantiser_schedules.py --data-root DIR --nested anyprec=DIR joint-4=DIR
    python benchmarks/quantiser_schedules.py --data-root DIR --nested joint=DIR joint=DIR joint=DIR    three stretches

Nested models are folders of shards, as ``quantisers.py --keep`` leaves them; those of one name, of several calibration
stretches, are one line, a prompt's score the mean over them. Uniform precisions, prefill included, and static
schedules: prefill and the first s decode steps at the higher precision of a pair, the others at the lower.
*average_bits* is the mean over prompts of the mean over decode steps; *agreement* the mean ROUGE-L x 100 with the
16-bit model's own greedy answer, with the 95 % bootstrap interval over prompts; *stretches* the models of that name.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
from quantiser_bench import NEW_TOKENS, Bench, parser

from pmpd.files import atomic
from pmpd.metrics import bootstrap_statistic
from pmpd.models import attach
from pmpd.records import Schedule, average_bits

HEADER = ("quantizer", "schedule", "average_bits", "agreement", "low", "high", "n", "stretches", "commit")
RESAMPLES = 2000


def schedules(uniform: list[int], pairs: list[str], steps: list[int], available: list[int]) -> list[Schedule]:
    """Those that a nested model of the precisions ``available`` has."""
    levels = [tuple(int(bits) for bits in pair.split("/")) for pair in pairs]
    static = [Schedule(high, (high, low), (step,)) for high, low in levels for step in steps]
    chosen = [Schedule.uniform(bits) for bits in uniform] + static
    return [s.canonical(NEW_TOKENS) for s in chosen if {s.prefill_bits, *s.levels} <= set(available)]


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def main() -> None:
    arguments = parser(__doc__, Path("docs/results/quantiser_schedules.csv"))
    arguments.add_argument("--nested", nargs="+", required=True, metavar="NAME=DIR")
    arguments.add_argument("--uniform", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    arguments.add_argument("--pairs", nargs="+", default=["4/3", "4/2", "3/2"])
    arguments.add_argument("--steps", nargs="+", type=int, default=[0, 8, 16, 32, 48])
    args = arguments.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        atomic(args.out) as whole,
        whole.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        bench = Bench(args, Path(scratch))
        folders: dict[str, list[Path]] = {}
        for name, folder in (pair.split("=", 1) for pair in args.nested):
            folders.setdefault(name, []).append(Path(folder))
        for name, own in folders.items():
            bits: dict[Schedule, list[float]] = {}
            scores: dict[Schedule, list[list[float]]] = {}
            for folder in own:
                model = bench.model()
                cell = attach(model, folder)
                wanted = schedules(args.uniform, args.pairs, args.steps, cell.available)
                for schedule, tokens in zip(wanted, bench.tokens_under(model, cell, wanted), strict=True):
                    means = [average_bits(schedule.bits_of(len(ids))) for ids in tokens if len(ids) > 1]
                    bits.setdefault(schedule, []).extend(means)
                    texts = [bench.prompter.text(ids) for ids in tokens]
                    scores.setdefault(schedule, []).append(bench.agreement(texts))
            for schedule, found in scores.items():
                score = bootstrap_statistic([(value, 1) for value in np.mean(found, axis=0)], mean, RESAMPLES, 0)
                row = (name, schedule.name, f"{np.mean(bits[schedule]):.4f}", f"{score.value:.3f}", f"{score.low:.3f}",
                       f"{score.high:.3f}", score.n, len(own), args.commit)  # fmt: skip
                writer.writerow(row)
                sys.stdout.write(" ".join(map(str, row)) + "\n")


if __name__ == "__main__":
    main()
