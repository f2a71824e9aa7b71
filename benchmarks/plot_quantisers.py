"""The table and the figures of what ``quantisers.py`` and ``quantiser_schedules.py`` wrote.

python benchmarks/plot_quantisers.py          reads and writes docs/results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
LEFT_OUT = r"\d\.\d|gptq-(?!96-asym-mse)"  # of the figure: variants that another of their kind stands for
SHOWN = {"c4": "C4", "wikitext-2": "WikiText-2"}


def spread(values: pd.Series) -> str:
    """Mean over calibration seeds, and the largest distance from it."""
    mean = values.mean()
    digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    far = (values - mean).abs().max()
    return f"{mean:.{digits}f}" + (f" ± {far:.{digits}f}" if len(values) > 1 else "")


def table(rows: pd.DataFrame) -> str:
    """A line a quantiser, bits and corpus."""
    lines = [
        "| quantizer | bits | true bits | C4 | WikiText-2 | agreement | s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, bits), part in rows.groupby(["quantizer", "bits"], sort=False):
        by_corpus = [spread(part[part.corpus == corpus].perplexity) for corpus in SHOWN]
        agreement = part.agreement.dropna()
        seconds = part.quantise_s.dropna()
        lines.append(
            f"| {name} | {bits} | {part.true_bits.mean():.2f} | {by_corpus[0]} | {by_corpus[1]} "
            f"| {'' if agreement.empty else f'{agreement.iloc[0]:.1f}'} "
            f"| {'' if seconds.empty else f'{seconds.mean():.0f}'} | {part.seed.nunique()} |"
        )
    return "\n".join(lines) + "\n"


def plot_perplexity(rows: pd.DataFrame, file: Path) -> None:
    """Nats a token above 16 bits, which spreads out what perplexities crowd together."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
    for axis, (corpus, title) in zip(axes, SHOWN.items(), strict=True):
        part = rows[(rows.corpus == corpus) & ~rows.quantizer.str.contains(LEFT_OUT)]
        fp16 = part[part.quantizer == "fp16"].perplexity.iloc[0]
        for name, own in part[part.quantizer != "fp16"].groupby("quantizer", sort=False):
            own = own.assign(excess=np.log(own.perplexity / fp16)).query("bits < 8")
            by_bits = own.groupby("bits").agg({"true_bits": "mean", "excess": ["mean", "min", "max"]})
            x, y = by_bits["true_bits"]["mean"], by_bits["excess"]
            axis.errorbar(x, y["mean"], [y["mean"] - y["min"], y["max"] - y["mean"]], marker="o", ms=4, label=name)
        axis.set(title=f"{title} (16 bits: {fp16:.2f})", xlabel="true bits a weight", yscale="log")
    axes[0].set_ylabel("nats a token above 16 bits")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def plot_schedules(rows: pd.DataFrame, file: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for k, (name, own) in enumerate(rows.groupby("quantizer", sort=False)):
        levels = own.schedule.str.split(":").str[1].str.split(",")
        prefill = own.schedule.str.split(":").str[0]
        uniform = (levels.str.len() == 1) & (levels.str[0] == prefill)
        for part, marker, style in ((own[uniform], "s", "-"), (own[~uniform], "o", "none")):
            part = part.sort_values("average_bits")
            axis.errorbar(part.average_bits, part.agreement, [part.agreement - part.low, part.high - part.agreement],
                          marker=marker, ms=5, linestyle=style, color=f"C{k}", alpha=0.8, elinewidth=0.7,
                          mfc=f"C{k}" if marker == "s" else "none",
                          label=f"{name}, {'uniform' if marker == 's' else 'static'}")  # fmt: skip
    axis.set(xlabel="average bits of decode steps", ylabel="ROUGE-L with the 16-bit answer, x 100")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = pd.read_csv(args.results / "quantisers.csv")
    (args.results / "quantisers.md").write_text(table(rows), encoding="utf-8")
    plot_perplexity(rows, args.results / "quantisers.png")
    schedules = args.results / "quantiser_schedules.csv"
    if schedules.exists():
        plot_schedules(pd.read_csv(schedules), args.results / "quantiser_schedules.png")


if __name__ == "__main__":
    main()
