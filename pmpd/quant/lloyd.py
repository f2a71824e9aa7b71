"""The paper's search for clusters, by the library flash1dkmeans: k-means++ and Lloyd's iterations, seeded.

The same kind of cuts as ``kmeans``, not the optimal ones; kept to measure what the exact search is worth.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit, prange

if TYPE_CHECKING:
    from pmpd.quant.kmeans import Cuts, SortedRows

MAX_ITERATIONS = 50
RANDOM_STATE = 0


def seed_clusters(rows: SortedRows, num_clusters: int) -> Cuts:
    """As :func:`kmeans.seed_clusters`, by k-means++ (the same seed for every row) and at most 50 iterations.

    Rows of at most ``num_clusters`` values have one value a cluster.

    Raises:
        ImportError: flash1dkmeans is not installed.
    """
    seed, _ = _loops()
    num_rows, n = rows.values.shape
    if n <= num_clusters:
        return np.tile(np.minimum(np.arange(num_clusters + 1, dtype=np.int32), n), (num_rows, 1))
    return seed(rows.values, rows.weights, num_clusters)


def split_clusters(rows: SortedRows, cuts: Cuts) -> Cuts:
    """As :func:`kmeans.split_clusters`, by a binary search for a point where Lloyd's iterations stand still."""
    _, split = _loops()
    return split(rows.values, rows.weights, cuts)


@lru_cache(maxsize=1)
def _loops() -> tuple[Any, Any]:
    """The library's routines looped over rows, compiled when first used, since the library is optional."""
    try:
        from flash1dkmeans import numba_kmeans_1d_k_cluster as k_clusters
        from flash1dkmeans import numba_kmeans_1d_two_cluster as two_clusters
    except ImportError as error:
        raise ImportError("solver=lloyd needs flash1dkmeans: pip install 'pmpd[lloyd]'") from error

    @njit(parallel=True)
    def seed(values, weights, num_clusters):  # type: ignore[no-untyped-def]
        num_rows, n = values.shape
        cuts = np.empty((num_rows, num_clusters + 1), np.int32)
        for r in prange(num_rows):
            x, w = values[r], weights[r]
            mass, moment, squares = np.cumsum(w), np.cumsum(w * x), np.cumsum(w * x * x)
            cuts[r] = k_clusters(x, num_clusters, MAX_ITERATIONS, mass, moment, squares, 0, n, RANDOM_STATE)[1]
        return cuts

    @njit(parallel=True)
    def split(values, weights, cuts):  # type: ignore[no-untyped-def]
        num_rows, num_cuts = cuts.shape
        result = np.empty((num_rows, 2 * num_cuts - 1), np.int32)
        for r in prange(num_rows):
            mass, moment = np.cumsum(weights[r]), np.cumsum(weights[r] * values[r])
            for c in range(num_cuts - 1):
                start, stop = cuts[r, c], cuts[r, c + 1]
                result[r, 2 * c] = start
                result[r, 2 * c + 1] = stop
                if stop - start > 1:
                    result[r, 2 * c + 1] = two_clusters(values[r], mass, moment, start, stop)[1][1]
            result[r, 2 * num_cuts - 2] = cuts[r, num_cuts - 1]
        return result

    return seed, split
