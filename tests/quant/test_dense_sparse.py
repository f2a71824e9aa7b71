"""Dense and sparse against its definition in float64: what is kept is exact, what is left is clustered without it."""

from __future__ import annotations

import pytest
import torch

from pmpd.quant import quantize_dense_sparse, quantize_weight
from pmpd.quant.dense_sparse import outlier_count

OUT, IN = 8, 256


@pytest.fixture
def matrix() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    weight[:, ::50] *= 12
    return weight, torch.rand(OUT, IN, generator=generator) ** 4


@pytest.mark.parametrize("outliers", ["sensitivity", "magnitude"])
def test_outliers_are_exact_and_take_no_part_in_the_clusters(matrix, outliers: str) -> None:
    weight, sensitivity = matrix
    found = quantize_dense_sparse(weight, sensitivity, bits=3, extra_bits=0.5, outliers=outliers, accounting="stored")
    assert found.outliers is not None
    rows, columns = found.outliers.places()
    kept = torch.zeros(OUT, IN, dtype=torch.bool)
    kept[rows, columns] = True
    stored = found.dequantize(3, torch.float64)
    torch.testing.assert_close(stored[kept], weight[kept].double(), rtol=2e-3, atol=1e-3)
    larger = torch.where(kept, 100 * weight, weight)
    again = quantize_dense_sparse(larger, sensitivity, bits=3, extra_bits=0.5, outliers=outliers, accounting="stored")
    assert again.outliers is not None
    assert all(torch.equal(a, b) for a, b in zip(again.outliers.places(), (rows, columns), strict=True))
    # To a float16 step: a table's entry may lie between two.
    torch.testing.assert_close(again.dequantize(3, torch.float64)[~kept], stored[~kept], rtol=2**-10, atol=1e-6)
    if outliers == "magnitude":
        assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_more_bits_cost_less_and_sensitivity_costs_less_than_magnitude(matrix) -> None:
    weight, sensitivity = matrix

    def cost(extra_bits: float, outliers: str) -> float:
        found = quantize_dense_sparse(
            weight, sensitivity, bits=3, extra_bits=extra_bits, outliers=outliers, accounting="stored"
        )
        return float((sensitivity.double() * (weight - found.dequantize(3, torch.float64)).square()).sum())

    plain = quantize_weight(weight, sensitivity, seed_bits=3, parent_bits=3).dequantize(3, torch.float64)
    assert cost(0.0, "sensitivity") == pytest.approx(float((sensitivity.double() * (weight - plain).square()).sum()))
    costs = [cost(bits, "sensitivity") for bits in (0.0, 0.2, 0.5, 1.0)]
    assert costs == sorted(costs, reverse=True)
    assert cost(0.5, "sensitivity") < cost(0.5, "magnitude")


@pytest.mark.parametrize("extra_bits", [0.0, 0.1, 0.39, 1.0])
def test_stored_bits_stay_within_the_budget_and_nominal_ones_leave_indices_out(matrix, extra_bits: float) -> None:
    weight, sensitivity = matrix
    found = quantize_dense_sparse(
        weight, sensitivity, bits=3, extra_bits=extra_bits, outliers="magnitude", accounting="stored"
    )
    read = 0 if found.outliers is None else found.outliers.stored_bits
    assert read <= extra_bits * weight.numel()
    assert read > (extra_bits - 0.1) * weight.numel() - 32
    nominal = outlier_count(extra_bits, OUT, IN, "nominal")
    assert nominal == int(extra_bits * weight.numel() // 16)
    assert nominal >= outlier_count(extra_bits, OUT, IN, "stored")
