"""The tables and the figures of what ``quantisers.py``, its peers and ``quantiser_schedules.py`` wrote.

python benchmarks/plot_quantisers.py          reads and writes docs/results, and the marked tables of docs/quantisers.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from pages import filled

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
PAGE = RESULTS.parent / "quantisers.md"
SHOWN = {"c4": "C4", "wikitext-2": "WikiText-2"}
BITS = (2, 3, 4, 5, 6, 8)
LABELS = {
    "anyprec": "anyprec, the paper's search",
    "anyprec-exact": "anyprec, exact",
    "anyprec-exact-0.75": "the same, sensitivity to the power of 0.75",
    "anyprec-exact-refit": "anyprec, exact, refitted",
    "anyprec-exact-refit-tuned": "the same, tuned",
    "joint": "joint, 2 to 8 bits",
    "joint-tuned": "the same, tuned",
    "joint-4": "joint, 2 to 4 bits",
    "joint-4-tuned": "the same, tuned",
    "joint-4-outliers": "joint, 2 to 4 bits, 0.5 % outliers (+0.18 bits)",
    "joint-4-outliers-tuned": "the same, tuned",
    "joint-4-groups": "joint, 2 to 4 bits, a table for 192 columns (+0.24, 0.48, 0.96 bits)",
}
"""Nested quantisers in the tables' order."""
MORE_BITS = {"joint-4-outliers", "joint-4-outliers-tuned", "joint-4-groups"}
"""Those that read more than the planes and one table a row: not compared for a column's best."""
DRAWN = [name for name in LABELS if name != "anyprec-exact-0.75"]
DRAWN_PEERS = {"gptq-96-asym-mse": "s", "autoround-96-asym": "^", "anybcq-192": "D"}
"""In black, by marker."""
PEER_BITS = (2, 3, 4)
PEERS = {
    "gptq-96-asym": "GPTQ, 96 columns a scale, ranges min to max",
    "gptq-96-asym-mse": "the same, ranges of least squared error",
    "gptq-64-asym": "GPTQ, 64 columns, min to max",
    "gptq-64-asym-mse": "the same, least squared error",
    "gptq-row-asym-mse": "GPTQ, a scale a row, least squared error",
    "autoround-96-asym": "AutoRound, 96 columns a scale",
    "anybcq-192": "AnyBCQ's method, 192 columns a scale",
    "llamacpp-k-m": "llama.cpp's Q2_K, Q3_K_M, Q4_K_M: most layers fall back to Q4_0 or Q5_0",
    "llamacpp-k-m-imatrix": "the same, importance matrix",
    "llamacpp-k-s-flat-imatrix": "llama.cpp's Q2_K_S, Q3_K_S over rows, importance matrix",
    **{name: LABELS[name].replace("the same", "joint, 2 to 4 bits") for name in
       ("anyprec-exact", "anyprec-exact-refit", "joint", "joint-4", "joint-4-tuned")},
}  # fmt: skip


def spread(values: pd.Series, digits: int = 2) -> str:
    """Mean over calibration stretches, and the largest distance from it if there are several."""
    mean = values.mean()
    digits = 0 if mean >= 1000 else min(digits, 1) if mean >= 100 else digits
    far = (values - mean).abs().max()
    return f"{mean:.{digits}f}" + (f" ± {far:.{digits}f}" if len(values) > 1 else "")


def untuned(name: str) -> str:
    return name.removesuffix("-tuned")


def lines(header: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body))


def everything(rows: pd.DataFrame) -> str:
    """A line a quantiser and bits."""
    body = []
    for (name, bits), part in rows.groupby(["quantizer", "bits"], sort=False):
        agreement, seconds = part.drop_duplicates("seed").agreement.dropna(), part.quantise_s.dropna()
        body.append([
            name, str(bits), f"{part.true_bits.mean():.2f}",
            *(spread(part[part.corpus == corpus].perplexity) for corpus in SHOWN),
            "" if agreement.empty else spread(agreement, 1), "" if seconds.empty else f"{seconds.mean():.0f}",
            str(part.seed.nunique()),
        ])  # fmt: skip
    return lines(["quantizer", "bits", "true bits", *SHOWN.values(), "agreement", "s", "stretches"], body)


def by_bits(rows: pd.DataFrame, first: str, cell: Callable[[pd.DataFrame], str], best: Callable[..., float]) -> str:
    """A line a nested quantiser, a column a precision; in bold a column's best mean at the same true bits."""
    cells = {key: cell(part) for key, part in rows.groupby(["quantizer", "bits"])}
    means = {(name, b): float(text.split()[0]) for (name, b), text in cells.items() if name not in MORE_BITS}
    top = {b: best(mean for (_, own), mean in means.items() if own == b) for b in BITS}
    cells |= {key: f"**{cells[key]}**" for key, mean in means.items() if mean == top[key[1]]}
    body = [[label, *(cells.get((name, b), "") for b in BITS)] for name, label in LABELS.items()]
    return lines([first, *map(str, BITS)], [row for row in body if any(row[1:])])


def perplexities(rows: pd.DataFrame, corpus: str) -> str:
    own = rows[rows.corpus == corpus]
    fp16 = own[own.quantizer == "fp16"].perplexity.iloc[0]
    nested = own[own.quantizer.isin(LABELS)]
    return by_bits(nested, f"{SHOWN[corpus]} (16 bits {fp16:.2f})", lambda part: spread(part.perplexity), min)


def agreements(rows: pd.DataFrame) -> str:
    own = rows[(rows.corpus == "c4") & rows.quantizer.isin(LABELS) & rows.agreement.notna()]
    return by_bits(own, "", lambda part: spread(part.agreement, 1), max)


def peers(rows: pd.DataFrame) -> str:
    """Quantisers of one precision beside nested ones, at the first stretch, which all of them have."""
    body = []
    for name, label in PEERS.items():
        row = [label]
        for bits in PEER_BITS:
            part = rows[(rows.quantizer == name) & (rows.bits == bits) & (rows.seed == 0)]
            found = part.set_index("corpus").perplexity
            row += ["", ""] if part.empty else [
                f"{part.true_bits.iloc[0]:.2f}", " / ".join(spread(found[[corpus]]) for corpus in SHOWN)]  # fmt: skip
        if any(row[1:]):
            body.append(row)
    header = [title for bits in PEER_BITS for title in ("true bits", f"{bits} bits")]
    return lines(["C4 / WikiText-2", *header], body)


def schedules(rows: pd.DataFrame) -> str:
    """Agreement at average bits, by the schedules of each pair of precisions."""

    def at(own: pd.DataFrame, schedule: str) -> str:
        row = own[own.schedule == schedule].iloc[0]
        return f"{row.agreement:.1f} at {row.average_bits:.2f}"

    def uniform(own: pd.DataFrame, bits: int) -> str:
        row = own[own.schedule == f"{bits}:{bits}"].iloc[0]
        return f"{row.agreement:.1f} [{row.low:.1f}, {row.high:.1f}]"

    body = [
        [
            LABELS[name].replace("the same", LABELS[untuned(name)]),
            uniform(own, 4),
            *(
                " / ".join([at(own, f"4:4@{step},{low}") for step in (32, 16, 8)] + [at(own, f"4:{low}")])
                for low in (3, 2)
            ),
            uniform(own, 3),
        ]
        for name, own in rows.groupby("quantizer", sort=False)
    ]
    header = ["", "uniform 4", "4 then 3 after 32 / 16 / 8 / 0 steps", "4 then 2 after 32 / 16 / 8 / 0", "uniform 3"]
    return lines(header, body)


def read_schedules(results: Path) -> pd.DataFrame:
    """Of a quantiser and schedule the row over most stretches."""
    rows = pd.read_csv(results / "quantiser_schedules.csv")
    most = rows.groupby(["quantizer", "schedule"]).stretches.transform("max")
    return rows[rows.stretches == most]


def tables_of(results: Path) -> dict[str, str]:
    rows = pd.read_csv(results / "quantisers.csv")
    return {
        "c4": perplexities(rows, "c4"),
        "wikitext-2": perplexities(rows, "wikitext-2"),
        "agreement": agreements(rows),
        "peers": peers(rows),
        "schedules": schedules(read_schedules(results)),
    }


def plot_perplexity(rows: pd.DataFrame, file: Path) -> None:
    """Nats a token above 16 bits, which spreads out what perplexities crowd together; tuned ones are dashed."""
    colors = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(map(untuned, DRAWN)))}
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4), sharex=True, sharey=True, layout="constrained")
    for axis, (corpus, title) in zip(axes, SHOWN.items(), strict=True):
        part = rows[rows.corpus == corpus]
        fp16 = part[part.quantizer == "fp16"].perplexity.iloc[0]
        for name in [*DRAWN, *DRAWN_PEERS]:
            own = part[part.quantizer == name]
            own = own.assign(excess=np.log(own.perplexity / fp16)).query("bits < 8")
            by_bits = own.groupby("bits").agg({"true_bits": "mean", "excess": ["mean", "min", "max"]})
            x, y = by_bits["true_bits"]["mean"], by_bits["excess"]
            if name in DRAWN_PEERS:
                style = {"color": "black", "ls": ":", "marker": DRAWN_PEERS[name]}
            else:
                style = {"color": colors[untuned(name)], "ls": "--" if name != untuned(name) else "-", "marker": "o"}
            axis.errorbar(x, y["mean"], [y["mean"] - y["min"], y["max"] - y["mean"]], ms=4, label=name, **style)
        axis.set(title=f"{title} (16 bits: {fp16:.2f})", xlabel="true bits a weight", yscale="log")
    axes[0].set_ylabel("nats a token above 16 bits")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
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
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    rows = pd.read_csv(args.results / "quantisers.csv")
    (args.results / "quantisers.md").write_text(everything(rows) + "\n", encoding="utf-8")
    plot_perplexity(rows, args.results / "quantisers.png")
    plot_schedules(read_schedules(args.results), args.results / "quantiser_schedules.png")
    args.page.write_text(filled(args.page.read_text(encoding="utf-8"), tables_of(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
