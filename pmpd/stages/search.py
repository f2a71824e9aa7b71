"""The precision search on plain text: which precisions are lossless, alone and as a (prefill, decode) pair.

*Lossless*: perplexity at most ``tolerance`` (relative) above fp16's, over the same windows. The decision is on the
point estimate; the paired interval and the smallest rise that these windows could have shown stand beside it. The pair
search is the phase-aware step of the paper's Algorithm 1: each window's first half is read at the prefill
precision, its second half is scored at the decode precision over that cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pmpd.decode import two_phase_nll, window_nll
from pmpd.metrics import perplexity
from pmpd.records import FP16_BITS
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_windows
from pmpd.stages.runtime import load, progress
from pmpd.stages.scoring import mean_scores

LOGIT_TOKENS = 2048
"""Positions a forward: logits of a large vocabulary are what fills memory here."""
RESAMPLES, SEED = 2000, 0
"""Of the windows. Not keyed: another seed moves a standard error by 2 %, and is no reason to search again."""


@dataclass(frozen=True)
class SearchConfig:
    """Precisions ``seed_bits..parent_bits`` against fp16."""

    seed_bits: int
    parent_bits: int
    tolerance: float
    runtime: RuntimeConfig


def lowest_lossless(curve: Mapping[int, float], tolerance: float) -> int | None:
    """The lowest bits whose perplexity is within ``tolerance`` of ``curve[16]``, all higher ones being so too.

    None when not even the highest nested precision is.
    """
    limit = curve[FP16_BITS] * (1 + tolerance)
    lowest = None
    for bits in sorted((b for b in curve if b != FP16_BITS), reverse=True):
        if not curve[bits] <= limit:
            break
        lowest = bits
    return lowest


def cheapest_pair(
    precisions: Sequence[int], score: Callable[[int, int], float], limit: float
) -> tuple[tuple[int, int] | None, dict[tuple[int, int], float]]:
    """The cheapest (prefill, decode) pair whose ``score(prefill, decode)`` is at most ``limit``.

    Decoding reads the weights once a token, prefill once a prompt, so decode bits are lowered first,
    under the highest prefill, and then prefill bits, never below decode's: at most two evaluations a precision.

    Returns:
        the pair, None if the highest precisions miss the limit; and every score that was computed.
    """
    scores: dict[tuple[int, int], float] = {}
    falling = sorted(precisions, reverse=True)

    def meets(prefill: int, decode: int) -> bool:
        if (prefill, decode) not in scores:
            scores[prefill, decode] = score(prefill, decode)
        return scores[prefill, decode] <= limit

    top = falling[0]
    decodes = list(itertools.takewhile(lambda bits: meets(top, bits), falling))
    if not decodes:
        return None, scores
    decode = decodes[-1]
    prefills = itertools.takewhile(lambda bits: bits >= decode and meets(bits, decode), falling)
    return (list(prefills)[-1], decode), scores


def power(nll: Tensor, fp16: Tensor) -> dict[str, float]:
    """What windows could show of a precision's perplexity over fp16's; shares of fp16's.

    Args:
        nll: nats a token, ``[n, tokens]``.
        fp16: of the same tokens.

    Returns:
        ``relative_low`` and ``relative_high``: 95 % bootstrap interval over windows, paired; ``detectable_rise``: the
        smallest true rise that would have been shown four times in five, by the rule of the static fit. Means of nats
        are compared, whose difference is the logarithm of the ratio of perplexities. All are NaN where a
        token's nats are not finite. ``n``: windows.
    """
    names = ("relative_low", "relative_high", "detectable_rise")
    if not (nll.isfinite().all() and fp16.isfinite().all()):
        return dict.fromkeys(names, math.nan) | {"n": len(nll)}
    own, base = (mean_scores(values.mean(1).tolist()) for values in (nll, fp16))
    difference = own.minus(base, RESAMPLES, SEED)
    logarithms = (difference.low, difference.high, own.detectable_drop(base, RESAMPLES, SEED))
    return {name: _expm1(value) for name, value in zip(names, logarithms, strict=True)} | {"n": len(nll)}


def run_search(config: SearchConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Perplexity at every precision, and the pair search."""
    windows = read_windows(inputs["texts"])
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    assert cell is not None
    half = windows.shape[1] // 2
    batch = max(1, LOGIT_TOKENS // windows.shape[1])
    nested = list(range(config.parent_bits, config.seed_bits - 1, -1))

    nll: dict[int, Tensor] = {}
    for bits in progress([FP16_BITS, *nested], "perplexity"):
        nll[bits] = window_nll(model, cell, windows, bits, batch_size=batch)
        cell.drop(bits)
    curve = {bits: perplexity(own) for bits, own in sorted(nll.items())}
    second_half = {(bits, bits): own[:, half:] for bits, own in nll.items()}

    def pair_perplexity(prefill_bits: int, decode_bits: int) -> float:
        pair = prefill_bits, decode_bits
        if pair not in second_half:
            for bits in nested:
                if bits not in pair:
                    cell.drop(bits)
            second_half[pair] = two_phase_nll(model, cell, windows, half, *pair, batch_size=batch)
            bar.update()
        return perplexity(second_half[pair])

    fp16_half = second_half[FP16_BITS, FP16_BITS]
    limit = perplexity(fp16_half) * (1 + config.tolerance)
    with progress(None, "pairs of precisions") as bar:
        pair, scores = cheapest_pair(nested, pair_perplexity, limit)

    means = {bits: own.mean(1).tolist() for bits, own in sorted(nll.items())}
    lossless = lowest_lossless(curve, config.tolerance)
    shown = {bits: power(own, nll[FP16_BITS]) for bits, own in nll.items()}
    write_summary(
        out,
        {
            "fp16_perplexity": curve[FP16_BITS],
            "tolerance": config.tolerance,
            "lowest_lossless_bits": lossless,
            "detectable_rise": max(shown[b]["detectable_rise"] for b in nested if b >= lossless) if lossless else None,
            "pair_prefill_bits": pair[0] if pair else None,
            "pair_decode_bits": pair[1] if pair else None,
            "fp16_second_half_perplexity": perplexity(fp16_half),
            "num_windows": windows.shape[0],
            "window_tokens": windows.shape[1],
        },
        curves={
            "perplexity": [
                {"bits": b, "perplexity": p, "relative": p / curve[FP16_BITS] - 1, **shown[b]} for b, p in curve.items()
            ],
            "pairs": [
                {
                    "prefill_bits": p,
                    "decode_bits": d,
                    "perplexity": v,
                    "relative": v / perplexity(fp16_half) - 1,
                    **power(second_half[p, d], fp16_half),
                }
                for (p, d), v in scores.items()
            ],
        },
        # From these any other statistic of the curve can be made without the model.
        tables={
            "nats": [{"window": i, **{f"{b} bits": own[i] for b, own in means.items()}} for i in range(len(windows))]
        },
    )


def _expm1(value: float) -> float:
    try:
        return math.expm1(value)
    except OverflowError:  # as a perplexity that overflows
        return math.inf


SEARCH = Stage("search", 3, SearchConfig, run_search, "perplexity at every precision")
