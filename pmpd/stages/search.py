"""The precision search on plain text: which precisions are lossless, alone and as a (prefill, decode) pair.

*Lossless*: perplexity at most ``tolerance`` (relative) above fp16's, over the same windows. The pair
search is the phase-aware step of the paper's Algorithm 1: each window's first half is read at the prefill
precision, its second half is scored at the decode precision over that cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmpd.decode import two_phase_nll, window_nll
from pmpd.metrics import perplexity
from pmpd.records import FP16_BITS
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_windows
from pmpd.stages.runtime import load, progress

LOGIT_TOKENS = 2048
"""Positions a forward: logits of a large vocabulary are what fills memory here."""


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


def run_search(config: SearchConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Perplexity at every precision, and the pair search."""
    windows = read_windows(inputs["texts"])
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    assert cell is not None
    half = windows.shape[1] // 2
    batch = max(1, LOGIT_TOKENS // windows.shape[1])
    nested = list(range(config.parent_bits, config.seed_bits - 1, -1))

    curve: dict[int, float] = {}
    second_half: dict[int, float] = {}
    for bits in progress([FP16_BITS, *nested], "perplexity"):
        nll = window_nll(model, cell, windows, bits, batch_size=batch)
        curve[bits], second_half[bits] = perplexity(nll), perplexity(nll[:, half:])
        cell.drop(bits)

    def pair_perplexity(prefill_bits: int, decode_bits: int) -> float:
        if prefill_bits == decode_bits:
            return second_half[decode_bits]
        for bits in nested:
            if bits not in (prefill_bits, decode_bits):
                cell.drop(bits)
        nll = two_phase_nll(model, cell, windows, half, prefill_bits, decode_bits, batch_size=batch)
        bar.update()
        return perplexity(nll)

    fp16_half = second_half[FP16_BITS]
    with progress(None, "pairs of precisions") as bar:
        pair, scores = cheapest_pair(nested, pair_perplexity, fp16_half * (1 + config.tolerance))

    lossless = lowest_lossless(curve, config.tolerance)
    write_summary(
        out,
        {
            "fp16_perplexity": curve[FP16_BITS],
            "tolerance": config.tolerance,
            "lowest_lossless_bits": lossless,
            "pair_prefill_bits": pair[0] if pair else None,
            "pair_decode_bits": pair[1] if pair else None,
            "fp16_second_half_perplexity": fp16_half,
            "num_windows": windows.shape[0],
            "window_tokens": windows.shape[1],
        },
        curves={
            "perplexity": [
                {"bits": b, "perplexity": p, "relative": p / curve[FP16_BITS] - 1} for b, p in sorted(curve.items())
            ],
            "pairs": [
                {"prefill_bits": p, "decode_bits": d, "perplexity": v, "relative": v / fp16_half - 1}
                for (p, d), v in scores.items()
            ],
        },
    )


SEARCH = Stage("search", 2, SearchConfig, run_search, "perplexity at every precision")
