"""Exact weighted k-means of many short rows of numbers, nested: a seed clustering, then every cluster cut in two.

It knows only rows of values and weights; bits, layers and groups are the caller's words.

In one dimension the clusters of an optimal k-means are intervals of the sorted values (Fisher, 1958), so a clustering
of a row of n values is a non-falling list of *cuts* ``0 = c_0 <= c_1 <= ... <= c_k = n``: cluster j holds the sorted
values ``c_j .. c_{j+1} - 1``, possibly none. The seed is found by dynamic programming over prefixes, each layer by
halving (the best last cut never moves left as the prefix grows): O(k n log n) a row. Sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Cuts = NDArray[np.int32]

WEIGHT_FLOOR = 1e-7
"""Least weight of a value, relative to its row's mean weight: a value that nothing depends on still gets a code near it
and changes no other value's by a measurable amount."""


@dataclass(frozen=True)
class SortedRows:
    """Rows in rising order of value (ties by position).

    Attributes:
        order: int32 ``[rows, n]``, where each value was.
        values: float64 ``[rows, n]``.
        weights: float64 ``[rows, n]``, positive, of mean about one in each row.
    """

    order: NDArray[np.int32]
    values: Floats
    weights: Floats


def sort_rows(values: NDArray[np.float32], weights: NDArray[np.float32]) -> SortedRows:
    """Sort each row and scale its weights; a row of zero weights is taken as one of equal weights.

    Args:
        values, weights: float32 ``[rows, n]``.

    Raises:
        ValueError: shapes that differ, values that are not finite, weights that are negative or not finite.
    """
    if values.shape != weights.shape or values.ndim != 2:
        raise ValueError(f"values and weights must be the same [rows, n], got {values.shape} and {weights.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights must be finite and not negative")
    # One sort of unique integers: the value's bits, made to rise with the value, above its position. Unlike an
    # argsort of floats this is both vectorised and stable, so ties fall the same way on every CPU.
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.int32)
    rising = (bits ^ (bits >> 31 | np.int32(-(1 << 31)))).view(np.uint32)
    keys = rising.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(values.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    order = keys.astype(np.uint32).view(np.int32)  # the low word
    return SortedRows(order, *_gather(order, np.ascontiguousarray(values), np.ascontiguousarray(weights)))


def seed_clusters(rows: SortedRows, num_clusters: int) -> Cuts:
    """Cuts of the clustering of least weighted squared error of each row.

    Returns:
        int32 ``[rows, num_clusters + 1]``.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be >= 1, got {num_clusters}")
    return _seed(rows.values, rows.weights, num_clusters)


def split_clusters(rows: SortedRows, cuts: Cuts) -> Cuts:
    """Cut each cluster in two where the weighted squared error falls most.

    A cluster of one value or none is not cut: its second part is empty.

    Returns:
        int32 ``[rows, 2 * clusters + 1]``; every second cut is one of ``cuts``.
    """
    return _split(rows.values, rows.weights, cuts)


def centroids(rows: SortedRows, cuts: Cuts) -> Floats:
    """The weighted mean of each cluster, float64 ``[rows, clusters]``, rising.

    An empty cluster gets the mean of the one before it. So a cluster that was not cut splits into equal centroids.
    """
    return _means(rows.values, rows.weights, cuts)


def labels(rows: SortedRows, cuts: Cuts) -> NDArray[np.uint8]:
    """The cluster of each value at its place before sorting, uint8 ``[rows, n]``; at most 256 clusters."""
    assert cuts.shape[1] <= 257
    return _labels(rows.order, cuts)


@njit(parallel=True, cache=True)
def _gather(order, values, weights):  # type: ignore[no-untyped-def]
    num_rows, n = order.shape
    sorted_values = np.empty((num_rows, n))
    sorted_weights = np.empty((num_rows, n))
    for r in prange(num_rows):
        total = 0.0
        for i in range(n):
            total += weights[r, i]
        scale = n / total if total > 0 else 0.0
        for i in range(n):
            sorted_values[r, i] = values[r, order[r, i]]
            # A row of zero weights is one of equal weights: the floor.
            sorted_weights[r, i] = max(weights[r, order[r, i]] * scale, WEIGHT_FLOOR)
    return sorted_values, sorted_weights


@njit(parallel=True, cache=True)
def _seed(values, weights, num_clusters):  # type: ignore[no-untyped-def]
    num_rows = len(values)
    cuts = np.empty((num_rows, num_clusters + 1), np.int32)
    for r in prange(num_rows):
        _seed_row(values[r], weights[r], cuts[r])
    return cuts


@njit(cache=True)
def _seed_row(values, weights, cuts):  # type: ignore[no-untyped-def]
    n = len(values)
    num_clusters = len(cuts) - 1
    # Sums of prefixes, about the values' mean so that little cancels. The squared error of values i..j-1 is their
    # sum of w x^2, the same for every clustering, less S^2 / W: the programme minimises the sum of -S^2 / W.
    mass = np.empty(n + 1)
    moment = np.empty(n + 1)
    mass[0] = 0.0
    moment[0] = 0.0
    mean = 0.0
    for i in range(n):
        mean += values[i] / n
    for i in range(n):
        mass[i + 1] = mass[i] + weights[i]
        moment[i + 1] = moment[i] + weights[i] * (values[i] - mean)
    last_cut = np.zeros((num_clusters, n + 1), np.int32)
    cost = np.empty(n + 1)
    previous = np.empty(n + 1)
    cost[0] = 0.0
    for j in range(1, n + 1):
        cost[j] = -moment[j] * moment[j] / mass[j]
    for k in range(1, num_clusters):
        cost, previous = previous, cost
        cut = last_cut[k]
        cost[0] = 0.0
        if k == num_clusters - 1:  # only the whole row is wanted
            _best_cut(previous, mass, moment, cost, cut, n, 0, n)
            break
        stride = 1
        while 2 * stride <= n:
            stride *= 2
        while stride >= 1:  # prefixes between two that are known have their cut between theirs
            for j in range(stride, n + 1, 2 * stride):
                # Nor does it move left when the prefix has one cluster more.
                high = min(cut[j + stride], j) if j + stride <= n else j
                low = min(max(cut[j - stride], last_cut[k - 1, j]), high)
                _best_cut(previous, mass, moment, cost, cut, j, low, high)
            stride //= 2
    cuts[num_clusters] = n
    for k in range(num_clusters - 1, -1, -1):
        cuts[k] = last_cut[k, cuts[k + 1]]


@njit(cache=True)
def _best_cut(previous, mass, moment, cost, cut, j, low, high):  # type: ignore[no-untyped-def]
    """Where in low..high the last cluster of the prefix of length j starts; high = j leaves it empty."""
    best = previous[j] if high == j else np.inf
    best_i = high
    for i in range(min(high, j - 1), low - 1, -1):
        s = moment[j] - moment[i]
        candidate = previous[i] - s * s / (mass[j] - mass[i])
        if candidate < best:
            best = candidate
            best_i = i
    cost[j] = best
    cut[j] = best_i


@njit(parallel=True, cache=True)
def _split(values, weights, cuts):  # type: ignore[no-untyped-def]
    num_rows, num_cuts = cuts.shape
    split = np.empty((num_rows, 2 * num_cuts - 1), np.int32)
    for r in prange(num_rows):
        for c in range(num_cuts - 1):
            start, stop = cuts[r, c], cuts[r, c + 1]
            split[r, 2 * c] = start
            split[r, 2 * c + 1] = _split_cluster(values[r], weights[r], start, stop)
        split[r, 2 * num_cuts - 2] = cuts[r, num_cuts - 1]
    return split


@njit(cache=True)
def _split_cluster(values, weights, start, stop):  # type: ignore[no-untyped-def]
    """The cut of the cluster start..stop-1 that gains most; ``stop`` when none gains."""
    total = 0.0
    moment = 0.0
    for i in range(start, stop):
        total += weights[i]
        moment += weights[i] * (values[i] - values[start])
    if stop - start < 2 or moment <= 0:
        return stop
    mean = values[start] + moment / total
    # About the mean the two parts' moments are s and -s, and the gain s^2 / W_left + s^2 / W_right.
    best = 0.0
    best_i = stop
    left = 0.0
    s = 0.0
    for i in range(start, stop - 1):
        left += weights[i]
        s += weights[i] * (values[i] - mean)
        gain = s * s / (left * max(total - left, weights[i + 1]))
        if gain > best:
            best = gain
            best_i = i + 1
    return best_i


@njit(parallel=True, cache=True)
def _means(values, weights, cuts):  # type: ignore[no-untyped-def]
    num_rows, num_cuts = cuts.shape
    means = np.empty((num_rows, num_cuts - 1))
    for r in prange(num_rows):
        mean = values[r, 0]
        for c in range(num_cuts - 1):
            start, stop = cuts[r, c], cuts[r, c + 1]
            if stop > start:
                total = 0.0
                moment = 0.0
                for i in range(start, stop):
                    total += weights[r, i]
                    moment += weights[r, i] * (values[r, i] - values[r, start])
                mean = min(values[r, start] + moment / total, values[r, stop - 1])
            means[r, c] = mean
    return means


@njit(parallel=True, cache=True)
def _labels(order, cuts):  # type: ignore[no-untyped-def]
    num_rows, n = order.shape
    result = np.empty((num_rows, n), np.uint8)
    for r in prange(num_rows):
        for c in range(cuts.shape[1] - 1):
            for i in range(cuts[r, c], cuts[r, c + 1]):
                result[r, order[r, i]] = c
    return result
