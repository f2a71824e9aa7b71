from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.quant import kmeans
from pmpd.quant.kmeans import Cuts, SortedRows


def squared_error(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted squared error about the weighted mean."""
    if len(values) == 0:
        return 0.0
    mean = np.sum(weights * values) / np.sum(weights)
    return float(np.sum(weights * (values - mean) ** 2))


def least_error(values: np.ndarray, weights: np.ndarray, num_clusters: int) -> float:
    """Least weighted squared error of the sorted row, by trying every last cut of every prefix."""
    n = len(values)
    cost = [[squared_error(values[i:j], weights[i:j]) for j in range(n + 1)] for i in range(n + 1)]
    best = [cost[0][j] for j in range(n + 1)]
    for _ in range(num_clusters - 1):
        best = [min(best[i] + cost[i][j] for i in range(j + 1)) for j in range(n + 1)]
    return best[n]


def errors(rows: SortedRows, cuts: Cuts) -> np.ndarray:
    """Weighted squared error of each row about its float64 centroids."""
    means = kmeans.centroids(rows, cuts)
    total = np.zeros(len(cuts))
    for r, row_cuts in enumerate(cuts):
        for c, (start, stop) in enumerate(pairwise(row_cuts)):
            part = slice(start, stop)
            total[r] += np.sum(rows.weights[r, part] * (rows.values[r, part] - means[r, c]) ** 2)
    return total


def random_rows(seed: int, num_rows: int, n: int, kind: str = "gaussian") -> SortedRows:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((num_rows, n)).astype(np.float32) * 0.05
    weights = generator.random((num_rows, n)).astype(np.float32) ** 4
    if kind == "few_values":
        values = generator.integers(-2, 3, (num_rows, n)).astype(np.float32)
    elif kind == "heavy_tails":
        values = generator.standard_cauchy((num_rows, n)).astype(np.float32)
        weights = np.exp(3 * generator.standard_normal((num_rows, n))).astype(np.float32)
    elif kind == "mostly_zero_weights":
        weights *= generator.random((num_rows, n)) < 0.1
    elif kind == "far_from_zero":
        values += 1000
    return kmeans.sort_rows(values, weights)


KINDS = ["gaussian", "few_values", "heavy_tails", "mostly_zero_weights", "far_from_zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_clusters", [1, 2, 4, 8])
def test_seed_has_the_least_error(kind: str, num_clusters: int) -> None:
    rows = random_rows(num_clusters, 4, 45, kind)
    for row, error in enumerate(errors(rows, kmeans.seed_clusters(rows, num_clusters))):
        least = least_error(rows.values[row], rows.weights[row], num_clusters)
        assert error == pytest.approx(least, rel=1e-6, abs=1e-12 * squared_error(rows.values[row], rows.weights[row]))


@pytest.mark.parametrize("kind", KINDS)
def test_split_cuts_each_cluster_at_its_best_place(kind: str) -> None:
    rows = random_rows(3, 4, 60, kind)
    cuts = kmeans.seed_clusters(rows, 4)
    split = kmeans.split_clusters(rows, cuts)
    assert np.array_equal(split[:, ::2], cuts)
    for row in range(4):
        for c, (start, stop) in enumerate(pairwise(cuts[row])):
            values, weights = rows.values[row, start:stop], rows.weights[row, start:stop]
            middle = split[row, 2 * c + 1] - start
            error = squared_error(values[:middle], weights[:middle]) + squared_error(values[middle:], weights[middle:])
            scale = squared_error(rows.values[row], rows.weights[row])
            assert error == pytest.approx(least_error(values, weights, 2), rel=1e-6, abs=1e-12 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_error_never_rises_with_another_split(kind: str) -> None:
    rows = random_rows(5, 6, 200, kind)
    cuts = kmeans.seed_clusters(rows, 4)
    error = errors(rows, cuts)
    for _ in range(6):
        cuts = kmeans.split_clusters(rows, cuts)
        finer = errors(rows, cuts)
        assert (finer <= error * (1 + 1e-12)).all()
        error = finer


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=14),
    num_clusters=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_any_row_gives_whole_clusters_and_finite_centroids(
    values: list[float], num_clusters: int, data: st.DataObject
) -> None:
    weight = st.one_of(st.just(0.0), st.floats(0, 1e6, width=32))
    weights = data.draw(st.lists(weight, min_size=len(values), max_size=len(values)))
    rows = kmeans.sort_rows(np.array([values], np.float32), np.array([weights], np.float32))
    cuts = kmeans.seed_clusters(rows, num_clusters)
    for _ in range(3):
        means = kmeans.centroids(rows, cuts)
        assert cuts[0, 0] == 0
        assert cuts[0, -1] == len(values)
        assert (np.diff(cuts) >= 0).all()
        assert (np.diff(means) >= 0).all()
        assert means.min() >= min(values)
        assert means.max() <= max(values)
        cuts = kmeans.split_clusters(rows, cuts)


def test_enough_clusters_give_no_error() -> None:
    rows = random_rows(0, 3, 7)
    assert (errors(rows, kmeans.seed_clusters(rows, 8)) == 0).all()


def test_a_constant_row_has_equal_centroids() -> None:
    rows = kmeans.sort_rows(np.full((1, 20), 0.3, np.float32), np.ones((1, 20), np.float32))
    cuts = kmeans.split_clusters(rows, kmeans.seed_clusters(rows, 4))
    assert (kmeans.centroids(rows, cuts) == np.float32(0.3)).all()


def test_zero_weights_are_equal_weights() -> None:
    values = np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    zero = kmeans.sort_rows(values, np.zeros_like(values))
    equal = kmeans.sort_rows(values, np.full_like(values, 7))
    assert np.array_equal(kmeans.seed_clusters(zero, 4), kmeans.seed_clusters(equal, 4))


def test_values_of_no_weight_do_not_move_the_centroids() -> None:
    values = np.array([[0.0, 1.0, 10.0, 11.0, 500.0]], np.float32)
    weights = np.array([[1.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    rows = kmeans.sort_rows(values, weights)
    means = kmeans.centroids(rows, kmeans.seed_clusters(rows, 2))
    np.testing.assert_allclose(means, [[0.5, 10.5]], atol=1e-4)


def test_scale_of_weights_does_not_matter() -> None:
    values = np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    weights = np.random.default_rng(1).random((2, 30)).astype(np.float32)
    cuts = [kmeans.seed_clusters(kmeans.sort_rows(values, weights * scale), 4) for scale in (2**-60, 1, 2**60)]
    assert np.array_equal(cuts[0], cuts[1])
    assert np.array_equal(cuts[2], cuts[1])


def test_sorting_is_stable_over_signs_and_ties() -> None:
    values = np.array([[3.0, -1.0, 3.0, 0.0, -7.5, 1e-40, -1e-40, -1.0]], np.float32)
    weights = np.arange(1, 9, dtype=np.float32)[None]
    rows = kmeans.sort_rows(values, weights)
    assert np.array_equal(rows.order, np.argsort(values, axis=1, kind="stable"))
    assert np.array_equal(rows.values, np.sort(values.astype(np.float64), axis=1))
    np.testing.assert_allclose(rows.weights, weights[0, rows.order] / weights.mean())


def test_labels_stand_where_the_values_stood() -> None:
    rows = random_rows(0, 5, 40)
    cuts = kmeans.seed_clusters(rows, 8)
    labels = kmeans.labels(rows, cuts)
    for r in range(5):
        for c, (start, stop) in enumerate(pairwise(cuts[r])):
            assert set(np.flatnonzero(labels[r] == c)) == set(rows.order[r, start:stop])


@pytest.mark.parametrize(
    ("values", "weights", "match"),
    [
        ([[1.0, np.nan]], [[1.0, 1.0]], "values must be finite"),
        ([[1.0, 2.0]], [[1.0, -1.0]], "not negative"),
        ([[1.0, 2.0]], [[1.0, np.inf]], "weights must be finite"),
        ([[1.0, 2.0]], [[1.0]], "same"),
    ],
)
def test_bad_rows_are_refused(values: list[list[float]], weights: list[list[float]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kmeans.sort_rows(np.array(values, np.float32), np.array(weights, np.float32))
