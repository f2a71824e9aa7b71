from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from pmpd.metrics.bleu import bleu_signature, bleu_statistics, corpus_bleu, corpus_sacrebleu

WORDS = ["the", "a", "house", "walked,", "slowly", "home", "and", "then", "he", "saw", "it's", "3.5", "%", '"it"', "."]


def corpus(seed: int, n: int, longest: int = 14) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(n)]
    predictions = [
        " ".join(word for word in reference.split() if rng.random() > 0.15) + (" and" if rng.random() < 0.5 else "")
        for reference in references
    ]
    return predictions, references


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_equals_sacrebleu_on_the_same_corpus(seed: int, n: int) -> None:
    predictions, references = corpus(seed, n, longest=7 if n < 5 else 14)
    sums = bleu_statistics(predictions, [[reference] for reference in references]).sum(axis=0)
    plain = BLEU(tokenize="13a", smooth_method="none").corpus_score(predictions, [references]).score
    smoothed = BLEU(tokenize="13a", smooth_method="exp").corpus_score(predictions, [references]).score
    assert corpus_bleu(sums) == pytest.approx(plain, abs=1e-9)
    assert corpus_sacrebleu(sums) == pytest.approx(smoothed, abs=1e-9)


def test_several_references_equal_sacrebleu() -> None:
    predictions, first = corpus(1, 20)
    _, second = corpus(2, 20)
    sums = bleu_statistics(predictions, list(zip(first, second, strict=True))).sum(axis=0)
    expected = BLEU(smooth_method="none").corpus_score(predictions, [first, second]).score
    assert corpus_bleu(sums) == pytest.approx(expected, abs=1e-9)


def test_by_hand() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; prediction 5 words, reference 6.
    sums = bleu_statistics(["a b c d x"], [["a b c d e f"]])[0]
    assert sums.tolist() == [5, 6, 4, 3, 2, 1, 5, 4, 3, 2]
    expected = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert corpus_bleu(sums) == pytest.approx(expected, abs=1e-9)


def test_smoothing_is_the_only_difference() -> None:
    short = bleu_statistics(["a b c x y"], [["a b c d e"]])[0]  # no quadruple matches
    assert corpus_bleu(short) == 0.0
    assert corpus_sacrebleu(short) > 0.0
    full = bleu_statistics(["a b c d e"], [["a b c d e"]])[0]
    assert corpus_bleu(full) == pytest.approx(100.0)
    assert corpus_sacrebleu(full) == pytest.approx(100.0)


def test_many_corpora_at_once_equal_one_at_a_time() -> None:
    predictions, references = corpus(3, 12, longest=6)
    rows = bleu_statistics(predictions, [[reference] for reference in references])
    for score in (corpus_bleu, corpus_sacrebleu):
        assert score(rows).tolist() == [float(score(row)) for row in rows]


@pytest.mark.parametrize("score", [corpus_bleu, corpus_sacrebleu])
def test_an_empty_prediction_scores_zero(score: object) -> None:
    assert score(bleu_statistics([""], [["a b c d"]])[0]) == 0.0  # type: ignore[operator]


def test_signatures_name_the_smoothing() -> None:
    for metric, smoothing in (("bleu", "none"), ("sacrebleu", "exp")):
        scorer = BLEU(tokenize="13a", smooth_method=smoothing)
        scorer.corpus_score(["a"], [["a"]])
        assert f"nrefs:1|{bleu_signature(metric)}" == str(scorer.get_signature())
    with pytest.raises(ValueError, match="rouge_l"):
        bleu_signature("rouge_l")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1"):
        bleu_statistics(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        bleu_statistics(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="last dimension must be 10"):
        corpus_bleu(np.zeros((3, 4)))
