"""Corpus BLEU from per-sentence counts that can be summed, so that a bootstrap resamples sentences.

Counting is ``sacrebleu``'s (13a tokenizer, case kept); the formula is here, vectorised over resamples,
and equals sacrebleu's ``corpus_score``. Two numbers come from the same counts: *BLEU* without smoothing
(Papineni et al. 2002) and *SacreBLEU* with that package's default, exponential smoothing (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_NGRAM = 4
NUM_STATISTICS = 2 + 2 * MAX_NGRAM
"""Columns: prediction length, reference length, matched n-grams (n = 1..4), predicted n-grams (n = 1..4)."""

_SMOOTHING = {"bleu": "none", "sacrebleu": "exp"}


@cache
def _counter() -> Any:
    from sacrebleu.metrics import BLEU

    # Effective order changes a sentence's score, which is not read, not its counts; without it sacrebleu warns.
    return BLEU(tokenize="13a", effective_order=True)


def bleu_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Counts ``[n, NUM_STATISTICS]``, one row a sentence; sums over rows are a corpus's counts.

    With several references an n-gram matches as often as in the reference that has it most, and the
    length is that of the reference closest in length.

    Raises:
        ValueError: different numbers of predictions and references, or a sentence without a reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} sets of references")
    rows = np.zeros((len(predictions), NUM_STATISTICS), dtype=np.int64)
    for i, (prediction, group) in enumerate(zip(predictions, references, strict=True)):
        if not group:
            raise ValueError(f"references[{i}] is empty: BLEU needs at least one")
        score = _counter().sentence_score(prediction, list(group))
        rows[i] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def corpus_bleu(sums: NDArray[Any]) -> NDArray[np.float64]:
    """BLEU, 0 to 100, unsmoothed: ``[..., NUM_STATISTICS]`` summed counts to ``[...]``."""
    return _corpus_score(sums, exponential=False)


def corpus_sacrebleu(sums: NDArray[Any]) -> NDArray[np.float64]:
    """BLEU, 0 to 100, exponentially smoothed as ``sacrebleu`` does: ``[..., NUM_STATISTICS]`` to ``[...]``."""
    return _corpus_score(sums, exponential=True)


def bleu_signature(metric: str) -> str:
    """What determines the number but the texts, in sacrebleu's notation; ``metric`` is ``bleu`` or ``sacrebleu``.

    Raises:
        ValueError: another ``metric``.
    """
    if metric not in _SMOOTHING:
        raise ValueError(f"metric={metric!r} has no BLEU signature: {' or '.join(_SMOOTHING)}")
    import sacrebleu

    return f"case:mixed|eff:no|tok:13a|smooth:{_SMOOTHING[metric]}|version:{sacrebleu.__version__}"


def _corpus_score(sums: NDArray[Any], *, exponential: bool) -> NDArray[np.float64]:
    sums = np.asarray(sums, dtype=np.float64)
    if sums.shape[-1:] != (NUM_STATISTICS,):
        raise ValueError(f"sums has shape {sums.shape}; the last dimension must be {NUM_STATISTICS}")
    sys_len, ref_len = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + MAX_NGRAM], sums[..., 2 + MAX_NGRAM :]
    defined = matched.any(axis=-1) & (total > 0).all(axis=-1) & (sys_len > 0)
    if exponential:
        # The k-th order without a match counts as 1 / 2^k of a match (method 3 of Chen and Cherry 2014).
        matched = np.where(matched == 0, 0.5 ** np.cumsum(matched == 0, axis=-1), matched)
    else:
        defined &= (matched > 0).all(axis=-1)
    precision = np.where(defined[..., None], matched, 1.0) / np.where(defined[..., None], total, 1.0)
    brevity = np.minimum(0.0, 1.0 - ref_len / np.where(defined, sys_len, 1.0))
    score = 100.0 * np.exp(brevity + np.log(precision).mean(axis=-1))
    return np.asarray(np.where(defined, score, 0.0))
