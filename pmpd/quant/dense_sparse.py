"""Dense and sparse at one precision: k-means over the many, float16 for the few that would cost most (SqueezeLLM,
Kim et al., 2024). The baseline that a schedule of nested precisions is compared with at equal bits.

Knows a matrix, its sensitivity and a budget; neither models nor schedules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmpd.quant.nested import NestedWeight, quantize_weight
from pmpd.quant.sparse import count_within, highest, take_outliers

NOMINAL_BITS = 16
"""What the paper's accounting charges an outlier: its value, not where it is."""

ROUNDS = 2
"""Of clusters without the outliers, and outliers by these clusters. SmolLM2, 15 layers, 3 bits and 0.4 for outliers,
sensitivity-weighted squared error against k-means without outliers: 0.52 (3 rounds), 0.55 (sensitivity times squared
weight), 0.69 (sensitivity), 0.66 (magnitude)."""


def outlier_count(bits: float, out_features: int, in_features: int, accounting: str) -> int:
    """How many outliers ``bits`` bits a weight pay for.

    Args:
        accounting: ``stored``, value, column and row counts; ``nominal``, 16 bits each, as in the paper.
    """
    budget = bits * out_features * in_features
    if accounting == "stored":
        return count_within(budget, out_features, in_features)
    assert accounting == "nominal", accounting
    return min(max(int(budget // NOMINAL_BITS), 0), out_features * in_features)


def quantize_dense_sparse(
    weight: Tensor,
    sensitivity: Tensor,
    *,
    bits: int,
    extra_bits: float,
    outliers: str,
    accounting: str,
    group_size: int | None = None,
    solver: str = "exact",
) -> NestedWeight:
    """``weight`` at ``bits`` bits, with as many outliers as ``extra_bits`` bits a weight pay for.

    Outliers take no part in the k-means of the others, and are exact but for float16.

    Args:
        weight, sensitivity: ``[out, in]``, sensitivity as for :func:`pmpd.quant.quantize_weight`.
        outliers: ``sensitivity`` chooses the weights that would cost most among the others, sensitivity times squared
            error, whose clusters are found without them; ``magnitude`` the largest.
    """

    def cluster(weights: Tensor) -> NestedWeight:
        return quantize_weight(weight, weights, seed_bits=bits, parent_bits=bits, group_size=group_size, solver=solver)

    count = outlier_count(extra_bits, weight.shape[0], weight.shape[1], accounting)
    if count == 0:
        return cluster(sensitivity)
    if outliers == "magnitude":
        chosen = highest(weight.abs(), count)
    else:
        assert outliers == "sensitivity", outliers
        chosen = highest(sensitivity * weight.square(), count)
        for _ in range(ROUNDS):
            left = cluster(sensitivity.masked_fill(chosen, 0.0)).dequantize(bits, torch.float32)
            chosen = highest(sensitivity * (weight - left).square(), count)
    dense = cluster(sensitivity.masked_fill(chosen, 0.0))
    found = take_outliers(weight, dense.dequantize(bits, torch.float32), chosen)
    return NestedWeight(dense.planes, dense.centroids, dense.in_features, dense.group_size, found)
