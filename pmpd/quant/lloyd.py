"""The paper's search for clusters, by the library flash1dkmeans: k-means++ and Lloyd's iterations, seeded.

The same cuts as ``kmeans``, not the optimal ones; kept to measure what the exact search is worth.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pmpd.quant.kmeans import Cuts, SortedRows

MAX_ITERATIONS = 50


def _library() -> Any:
    try:
        import flash1dkmeans
    except ImportError as error:
        raise ImportError("solver=lloyd needs flash1dkmeans: pip install 'pmpd[lloyd]'") from error
    return flash1dkmeans


def seed_clusters(rows: SortedRows, num_clusters: int, random_state: int = 0) -> Cuts:
    """As :func:`kmeans.seed_clusters`, by k-means++ (``random_state`` for every row) and at most 50 iterations.

    A row of at most ``num_clusters`` values has one value a cluster.
    """
    library = _library()
    num_rows, n = rows.values.shape
    if n <= num_clusters:
        return np.tile(np.minimum(np.arange(num_clusters + 1, dtype=np.int32), n), (num_rows, 1))
    cuts = np.empty((num_rows, num_clusters + 1), np.int32)
    for r, (values, weights) in enumerate(zip(rows.values, rows.weights, strict=True)):
        mass, moment = np.cumsum(weights), np.cumsum(weights * values)
        squares = np.cumsum(weights * values**2)
        _, cuts[r] = library.numba_kmeans_1d_k_cluster(
            values, num_clusters, MAX_ITERATIONS, mass, moment, squares, 0, n, random_state
        )
    return cuts


def split_clusters(rows: SortedRows, cuts: Cuts) -> Cuts:
    """As :func:`kmeans.split_clusters`, by a binary search for a point where Lloyd's iterations stand still."""
    two_clusters = _library().numba_kmeans_1d_two_cluster
    split = np.empty((len(cuts), 2 * cuts.shape[1] - 1), np.int32)
    split[:, ::2] = cuts
    for r, (values, weights) in enumerate(zip(rows.values, rows.weights, strict=True)):
        mass, moment = np.cumsum(weights), np.cumsum(weights * values)
        for c, (start, stop) in enumerate(pairwise(cuts[r])):
            split[r, 2 * c + 1] = two_clusters(values, mass, moment, start, stop)[1][1] if stop - start > 1 else stop
    return split
