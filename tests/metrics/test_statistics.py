from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from pmpd.metrics import statistics
from pmpd.metrics.statistics import (
    bootstrap_statistic,
    paired_statistic_difference,
    smallest_detectable_drop_statistic,
)
from pmpd.records import Interval

RESAMPLES = 600


def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of rows ``[value, 1]``."""
    return sums[:, 0] / sums[:, 1]


def rows(values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, float)
    return np.stack([column, np.ones_like(column)], axis=1)


def bootstrap_mean(values: ArrayLike, resamples: int, seed: int, level: float = 0.95) -> Interval:
    return bootstrap_statistic(rows(values), mean, resamples, seed, level)


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int, seed: int) -> Interval:
    return paired_statistic_difference(rows(a), rows(b), mean, resamples, seed)


def smallest_detectable_drop(a: ArrayLike, b: ArrayLike, power: float = 0.8) -> float:
    """The textbook formula for a mean: two t quantiles times ``sd(a - b) / sqrt(n)``."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    t = scipy_stats.t(len(differences) - 1)
    return float((t.ppf(0.975) + t.ppf(power)) * differences.std(ddof=1) / math.sqrt(len(differences)))


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[:, 0] / sums[:, 1]


def test_value_is_the_mean_and_equal_values_leave_no_doubt() -> None:
    interval = bootstrap_mean([1.0, 2.0, 6.0], RESAMPLES, seed=0)
    assert (interval.value, interval.n) == (3.0, 3)
    assert interval.low < 3.0 < interval.high
    same = bootstrap_mean([0.5] * 8, RESAMPLES, seed=0)
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)


def test_two_coins_by_hand() -> None:
    # Two units 0 and 1: the resampled mean is 0, 1/2 or 1, and the tails are cut at far less than 1/4.
    interval = bootstrap_mean([0.0, 1.0], RESAMPLES, seed=3)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_equals_resampling_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=9)
    rng = np.random.default_rng(7)
    means = [values[rng.integers(9, size=9)].mean() for _ in range(RESAMPLES)]
    t = scipy_stats.t.ppf(0.975, 8)
    tail = scipy_stats.norm.cdf(-math.sqrt(9 / 8) * t)
    interval = bootstrap_mean(values, RESAMPLES, seed=7)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])), abs=1e-12)
    monkeypatch.setattr(statistics, "_CHUNK_COUNTS", 50)  # memory bound, not meaning
    assert bootstrap_mean(values, RESAMPLES, seed=7) == interval


def test_the_seed_decides() -> None:
    values = np.arange(10.0)
    assert bootstrap_mean(values, RESAMPLES, seed=1) == bootstrap_mean(values, RESAMPLES, seed=1)
    assert bootstrap_mean(values, RESAMPLES, seed=1) != bootstrap_mean(values, RESAMPLES, seed=2)


@pytest.mark.parametrize("n", [12, 50])
def test_the_interval_of_a_normal_mean_covers_it_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [bootstrap_mean(rng.normal(2.0, 3.0, n), 1000, seed=i) for i in range(1000)]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert 0.925 <= covered <= 0.97  # 0.95 and 3 standard errors; plain percentiles of 12 samples reach 0.90


def test_a_wider_level_is_a_wider_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    narrow, wide = (bootstrap_mean(values, RESAMPLES, seed=0, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_statistic_of_sums_is_not_a_mean_of_statistics() -> None:
    assert bootstrap_statistic(np.array([[1.0, 1.0], [0.0, 9.0]]), ratio, RESAMPLES, seed=0).value == 0.1


def test_pairing_narrows_the_difference_of_correlated_scores() -> None:
    rng = np.random.default_rng(0)
    easy = rng.normal(size=60)
    a, b = easy + 0.1 * rng.normal(size=60) - 0.05, easy + 0.1 * rng.normal(size=60)
    paired = paired_difference(a, b, RESAMPLES, seed=0)
    alone = [bootstrap_mean(values, RESAMPLES, seed=0) for values in (a, b)]
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.25 * min(interval.high - interval.low for interval in alone)


def test_paired_statistic_of_a_linear_reduce_is_the_paired_mean() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 1))
    linear = paired_statistic_difference(a, b, lambda sums: sums[:, 0] / 20, RESAMPLES, seed=5)
    plain = paired_difference(a[:, 0], b[:, 0], RESAMPLES, seed=5)
    assert (linear.value, linear.low, linear.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_a_statistic_less_itself_is_nothing() -> None:
    same = np.random.default_rng(0).uniform(1, 2, size=(15, 2))
    interval = paired_statistic_difference(same, same, ratio, RESAMPLES, seed=0)
    assert (interval.value, interval.low, interval.high, interval.n) == (0.0, 0.0, 0.0, 15)
    assert smallest_detectable_drop_statistic(same, same, ratio, RESAMPLES, seed=0) == 0.0


def test_detectable_drop_by_hand() -> None:
    # Differences +1 and -1, 16 of each: sd = sqrt(32 / 31); t quantiles with 31 degrees of freedom.
    a, b = np.tile([1.0, -1.0], 16), np.zeros(32)
    expected = (2.0395134 + 0.8533703) * math.sqrt(32 / 31) / math.sqrt(32)
    drop = smallest_detectable_drop_statistic(rows(a), rows(b), mean, 40_000, seed=0)
    assert drop == pytest.approx(expected, rel=0.02)  # the bootstrap's own error at 40,000 resamples is 0.4 %
    assert smallest_detectable_drop_statistic(rows(a), rows(b), mean, 40_000, seed=0, power=0.9) > drop


def test_a_drop_of_that_size_is_found_with_that_power() -> None:
    rng = np.random.default_rng(0)
    n, found = 25, 0
    population = smallest_detectable_drop(rng.normal(size=200_000), np.zeros(200_000))
    drop = population * math.sqrt(200_000 / n) * (2.0639 + 0.8569) / (1.95997 + 0.84163)
    for i in range(400):
        found += paired_difference(rng.normal(size=n) - drop, np.zeros(n), RESAMPLES, seed=i).high < 0
    assert 0.74 <= found / 400 <= 0.86


def test_detectable_drop_of_a_mean_is_the_textbooks() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 40))
    drop = smallest_detectable_drop_statistic(rows(a), rows(b), mean, 4000, seed=0)
    assert drop == pytest.approx(smallest_detectable_drop(a, b), rel=0.05)


def test_one_unit_says_nothing() -> None:
    interval = bootstrap_mean([0.3], RESAMPLES, seed=0)
    assert (interval.value, interval.low, interval.high, interval.n) == (0.3, -math.inf, math.inf, 1)
    assert smallest_detectable_drop_statistic([[1, 2]], [[1, 3]], ratio, RESAMPLES, seed=0) == math.inf


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="stats must hold at least one unit"):
        bootstrap_mean([], RESAMPLES, seed=0)
    with pytest.raises(ValueError, match="stats: 1 of 2 units are not finite"):
        bootstrap_mean([1.0, math.nan], RESAMPLES, seed=0)
    with pytest.raises(ValueError, match=r"stats_a and stats_b are not paired: \(2, 2\) and \(3, 2\)"):
        paired_statistic_difference(np.ones((2, 2)), np.ones((3, 2)), ratio, RESAMPLES, seed=0)
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_mean([1.0, 2.0], 0, seed=0)
    with pytest.raises(ValueError, match=r"level=1\.0"):
        bootstrap_mean([1.0, 2.0], RESAMPLES, seed=0, level=1.0)
    with pytest.raises(ValueError, match=r"power=0\.2"):
        smallest_detectable_drop_statistic(np.ones((2, 2)), np.ones((2, 2)), ratio, RESAMPLES, seed=0, power=0.2)
