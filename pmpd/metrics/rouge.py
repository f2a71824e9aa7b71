"""ROUGE-L of one text, on the scale 0 to 1, never rounded.

Wraps the ``rouge-score`` package; knows nothing about tasks, samples or means over a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))  # named, since a default is logged


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F measure of the longest common subsequence (Lin 2004) with Porter stemming, mean over ``references``.

    A text without a word (the tokenizer keeps a-z and 0-9) scores 0. DialogSum's several references are
    averaged, not maximised: a better match with one annotator of three is not a better summary.

    Raises:
        ValueError: no reference.
    """
    if not references:
        raise ValueError("references is empty: ROUGE-L needs at least one")
    scorer = _scorer()
    scores = [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references]
    return sum(scores) / len(scores)
