from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pmpd.metrics.rouge import rouge_l


def test_by_hand() -> None:
    # Longest common subsequence "the cat the mat" = 4 of 6 predicted and 5 reference words: F = 2 * 4 / (6 + 5).
    assert rouge_l("The cat sat on the mat.", ["the cat is the mat"]) == pytest.approx(8 / 11, abs=1e-15)


def test_stems_words() -> None:
    assert rouge_l("he is walking home", ["he walks home"]) == pytest.approx(6 / 7)


def test_equals_the_library_unrounded() -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    prediction, reference = (
        "A fire burned three houses, and nobody was hurt.",
        "Three houses burned; it seems that no one was hurting.",
    )
    expected = scorer.score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, [reference]) == expected
    assert expected != round(expected, 6)


def test_references_are_averaged_not_maximised() -> None:
    assert rouge_l("one two", ["one two", "three four"]) == 0.5


@pytest.mark.parametrize(("prediction", "reference"), [("", "a b"), ("a b", ""), ("?!", "a b"), ("", "")])
def test_a_text_without_words_scores_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, [reference]) == 0.0


def test_no_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="references is empty"):
        rouge_l("a", [])
