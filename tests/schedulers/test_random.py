from __future__ import annotations

from collections import Counter

import pytest

from pmpd.records import class_schedules
from pmpd.schedulers import Blind, Random, Setting, build

CLASSES = tuple(class_schedules(4, (4, 3), 30))


def drawn(scheduler: Random, count: int = 4000) -> list[float]:
    counts = Counter(scheduler.policy().schedule for _ in range(count))
    return [counts[c] / count for c in CLASSES]


def test_uniform_draws_every_class_alike_and_a_prior_as_it_says() -> None:
    prior = (0.5, 0.25, 0.25, 0.0)
    for policy, options, shares, expected in (
        ("random", {}, (), [0.25] * 4),
        ("random", {"probabilities": list(prior)}, (), prior),
        ("random_prior", {}, prior, prior),
    ):
        scheduler = build(policy, Setting(4, (4, 3), CLASSES, 0, shares), options)
        assert isinstance(scheduler, Blind)
        # Four standard deviations of a share of 4000 draws.
        assert drawn(scheduler) == pytest.approx(expected, abs=4 * (0.25 / 4000) ** 0.5)


def test_draws_are_of_the_seed() -> None:
    draws = [[Random(4, CLASSES, [0.25] * 4, seed).policy().schedule for _ in range(1)] for seed in (0, 0)]
    assert draws[0] == draws[1]
    long = [[s.policy().schedule for _ in range(20)] for s in (Random(4, CLASSES, [0.25] * 4, k) for k in (0, 0, 1))]
    assert long[0] == long[1] != long[2]


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.3] * 4])
def test_what_is_no_distribution_over_the_classes_is_refused(probabilities: list[float]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        Random(4, CLASSES, probabilities, 0)
