"""Scores of completions under a metric, in the one form that means, intervals and paired differences need.

A :class:`Scores` keeps statistics a sample that can be summed, and how a sum becomes the metric: a mean
for ROUGE and BERTScore, a corpus statistic for BLEU. Values are on the 0 to 100 scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmpd.metrics import (
    bertscore_f1,
    bleu_signature,
    bleu_statistics,
    bootstrap_statistic,
    corpus_bleu,
    corpus_sacrebleu,
    paired_statistic_difference,
    rouge_l,
    smallest_detectable_drop_statistic,
)
from pmpd.records import Completion, Interval, Sample
from pmpd.stages.runtime import progress

Reduce = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Encoder:
    """BERTScore's encoder, and where it runs: a GPU's rounding differs in the last digits."""

    name: str
    device: str


@dataclass(frozen=True)
class Scores:
    """Per-sample statistics ``[n, k]`` and the reduction from summed statistics ``[..., k]`` to the metric."""

    statistics: NDArray[np.float64]
    reduce: Reduce

    def value(self) -> float:
        return float(self.reduce(self.statistics.sum(0, keepdims=True))[0])

    def each(self) -> NDArray[np.float64]:
        """The metric of every sample alone, ``[n]``."""
        return self.reduce(self.statistics)

    def interval(self, resamples: int, seed: int) -> Interval:
        """Bootstrap over samples (95 %)."""
        return bootstrap_statistic(self.statistics, self.reduce, resamples, seed)

    def minus(self, other: Scores, resamples: int, seed: int) -> Interval:
        """Paired difference: both resampled with the same samples."""
        return paired_statistic_difference(self.statistics, other.statistics, self.reduce, resamples, seed)

    def detectable_drop(self, other: Scores, resamples: int, seed: int) -> float:
        """The smallest true drop below ``other`` that these pairs would show four times in five."""
        return smallest_detectable_drop_statistic(self.statistics, other.statistics, self.reduce, resamples, seed)


def mean_scores(values: Sequence[float], scale: float = 1.0) -> Scores:
    """Scores whose metric is the mean of ``values`` times ``scale``."""
    column = np.asarray(values, dtype=np.float64) * scale
    return Scores(np.stack([column, np.ones_like(column)], axis=1), lambda total: total[..., 0] / total[..., 1])


def score(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]], encoder: Encoder) -> Scores:
    """Score one prediction a sample against its references."""
    match metric:
        case "rouge_l":
            pairs = progress(zip(predictions, references, strict=True), "ROUGE-L", len(predictions))
            return mean_scores([rouge_l(p, r) for p, r in pairs], 100)
        case "bertscore":
            texts = [list(r) for r in references]
            f1 = bertscore_f1(list(predictions), texts, encoder.name, encoder.device, progress=True)
            return mean_scores(f1, 100)
        case "bleu" | "sacrebleu":
            statistics = bleu_statistics(predictions, references).astype(np.float64)
            return Scores(statistics, corpus_bleu if metric == "bleu" else corpus_sacrebleu)
    raise ValueError(f"unknown metric {metric!r}")


def score_turns(
    metric: str,
    completions: Sequence[Completion],
    references: Sequence[Sequence[Sequence[str]]],
    encoder: Encoder,
) -> Scores:
    """Score completions with one or several turns; ``references[i][turn]`` are a turn's references.

    A sample's statistics are summed over its turns, so the unit that is resampled stays the sample.
    """
    owner = [i for i, c in enumerate(completions) for _ in c.generations]
    flat = score(
        metric,
        [g.text for c in completions for g in c.generations],
        [r for refs in references for r in refs],
        encoder,
    )
    statistics = np.zeros((len(completions), flat.statistics.shape[1]))
    np.add.at(statistics, owner, flat.statistics)
    return Scores(statistics, flat.reduce)


def references_of(samples: Sequence[Sample], fp16: Mapping[str, Completion]) -> list[list[list[str]]]:
    """References ``[sample][turn][reference]``: the data set's own, or, where it has none, the model's fp16 output."""
    return [[list(s.references)] if s.references else [[g.text] for g in fp16[s.id].generations] for s in samples]


def fp16_references(samples: Sequence[Sample], fp16: Mapping[str, Completion]) -> list[list[list[str]]]:
    """The model's own fp16 output as the only reference: what *agreement* is measured against."""
    return [[[g.text] for g in fp16[s.id].generations] for s in samples]


def unit_of(metric: str, encoder: str) -> str:
    """How a table names the metric's scale and settings."""
    match metric:
        case "rouge_l":
            return "F x 100, stemmed"
        case "bertscore":
            return f"F1 x 100, {encoder}"
    return f"corpus, {bleu_signature(metric)}"


def result(quantity: str, unit: str, interval: Interval) -> dict[str, Any]:
    """One row of the tidy frame."""
    return {
        "quantity": quantity,
        "unit": unit,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n": interval.n,
    }


def exact(quantity: str, unit: str, value: float, n: int) -> dict[str, Any]:
    """A row for a number that has no interval: a count, or a property of the sample."""
    return {"quantity": quantity, "unit": unit, "value": value, "ci_low": None, "ci_high": None, "n": n}
