"""Scores keep what means, intervals and paired differences need."""

import numpy as np
import pytest

from pmpd.records import Completion, Generation, Sample, Schedule
from pmpd.stages.scoring import Encoder, fp16_references, mean_scores, references_of, score, score_turns


def completion(sample_id, *texts):
    return Completion(sample_id, tuple(Generation(Schedule.uniform(4), 3, (1, 2), t, True) for t in texts))


def test_a_mean_is_the_plain_mean_with_n():
    interval = mean_scores([1.0, 2.0, 6.0]).interval(500, 0)
    assert interval.value == pytest.approx(3.0)
    assert interval.n == 3
    assert interval.low < 3.0 < interval.high


def test_a_paired_difference_with_itself_is_zero_without_width():
    scores = mean_scores([1.0, 2.0, 6.0])
    difference = scores.minus(scores, 200, 0)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval_of_scores_that_go_together():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 60)
    a, b = mean_scores(hard + rng.normal(1, 1, 60)), mean_scores(hard)
    paired = a.minus(b, 500, 0)
    alone = a.interval(500, 0)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_rouge_of_turns_is_the_mean_over_turns_resampled_by_sample():
    one = completion("a", "the cat sat", "nothing alike")
    scores = score_turns("rouge_l", [one], [[["the cat sat"], ["entirely different words"]]], Encoder("", "cpu"))
    assert scores.statistics.shape[0] == 1
    assert scores.value() == pytest.approx(50.0)


def test_bleu_is_a_corpus_statistic_not_a_mean():
    predictions, references = ["the cat sat on the mat today", "a b"], [["the cat sat on the mat today"], ["c d"]]
    scores = score("sacrebleu", predictions, references, Encoder("", "cpu"))
    assert scores.value() != pytest.approx(float(scores.each().mean()))


def test_references_are_the_models_own_fp16_output_only_where_a_task_has_none():
    fp16 = {"a": completion("a", "one", "two"), "b": completion("b", "three")}
    samples = [Sample("a", ("q", "r")), Sample("b", ("q",), ("given",))]
    assert references_of(samples, fp16) == [[["one"], ["two"]], [["given"]]]
    assert fp16_references(samples, fp16) == [[["one"], ["two"]], [["three"]]]


def test_rouge_of_many_texts_is_a_bar_on_a_terminal_and_nothing_in_a_log(stderr):
    log = stderr("log")
    plain = score("rouge_l", ["the cat sat"] * 3, [["the cat"]] * 3, Encoder("", "cpu")).value()
    assert log.getvalue() == ""
    screen = stderr("terminal")
    assert score("rouge_l", ["the cat sat"] * 3, [["the cat"]] * 3, Encoder("", "cpu")).value() == plain
    assert "ROUGE-L" in screen.getvalue()
