"""The confidence rule against a plain loop over probabilities."""

from __future__ import annotations

import statistics

import pytest
import torch

from pmpd.records import Prefill
from pmpd.schedulers import Setting, build


def logits_of(confidence: float) -> torch.Tensor:
    """``[1, 11]`` whose largest probability is ``confidence``, the rest alike."""
    rest = (1 - confidence) / 10
    return torch.tensor([[rest] * 4 + [confidence] + [rest] * 6], dtype=torch.float64).log()


def bits_of(confidences: list[float], levels: tuple[int, ...] = (4, 3), **options: float) -> list[int]:
    scheduler = build("confidence", Setting(4, levels, (), 0), options)
    policy = scheduler.begin(Prefill(torch.zeros(1), torch.zeros(1), torch.zeros(1), 9))
    assert policy.schedule is None
    return [policy.bits(t, logits_of(c)) for t, c in enumerate(confidences, start=1)]


def test_it_steps_down_once_a_later_token_is_surer_than_mean_and_deviation_of_the_first() -> None:
    first = [0.3, 0.5, 0.4, 0.6]
    limit = statistics.fmean(first) + 1.0 * statistics.stdev(first)
    below, above = limit - 1e-6, limit + 1e-6
    assert bits_of([*first, below, above, 0.2, 0.2], sigmas=1.0, first_tokens=4) == [4, 4, 4, 4, 4, 3, 3, 3]


def test_the_first_tokens_themselves_never_switch() -> None:
    assert bits_of([0.2, 0.2, 0.99], first_tokens=3) == [4, 4, 4]
    assert bits_of([0.2, 0.2, 0.99], first_tokens=2) == [4, 4, 3]


def test_more_deviations_wait_for_more_confidence() -> None:
    confidences = [0.3, 0.5, 0.4, 0.6, 0.65, 0.9]
    assert bits_of(confidences, sigmas=1.0, first_tokens=4)[-2:] == [3, 3]
    assert bits_of(confidences, sigmas=3.0, first_tokens=4)[-2:] == [4, 3]


def test_with_three_precisions_each_sure_token_is_one_step_down() -> None:
    assert bits_of([0.3, 0.3, 0.9, 0.2, 0.9, 0.9], (4, 3, 2), first_tokens=2) == [4, 4, 3, 3, 2, 2]


def test_the_published_defaults() -> None:
    first = [0.5] * 10
    assert bits_of([*first, 0.5, 0.51]) == [4] * 11 + [3]


def test_a_batch_is_refused_as_our_error() -> None:
    policy = build("confidence", Setting(4, (4, 3), (), 0), {}).begin(
        Prefill(torch.zeros(1), torch.zeros(1), torch.zeros(1), 9)
    )
    with pytest.raises(AssertionError):
        policy.bits(1, torch.zeros(2, 5))
