"""Refitted tables against the float64 minimum of the loss over tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pmpd.quant import NestedWeight, highest, quantize_weight, refit_tables, take_outliers
from pmpd.quant.joint import damped
from tests.quant.test_joint import layer, row_losses


def any_precision(weight: Tensor, group_size: int | None, with_outliers: bool) -> NestedWeight:
    outliers = None
    if with_outliers:
        outliers = take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), 20))
        weight = weight - outliers.add_to(torch.zeros_like(weight))
    own = quantize_weight(weight, torch.ones_like(weight), parent_bits=6, group_size=group_size)
    return replace(own, outliers=outliers)


def losses(weight: Tensor, nested: NestedWeight, moment: Tensor, bits: int) -> Tensor:
    return row_losses(weight, nested.dequantize(bits, torch.float64), damped(moment, 0.01))


def least_losses(weight: Tensor, nested: NestedWeight, moment: Tensor, bits: int) -> Tensor:
    """``[out]``: the loss with the best table that its codes can have, by least squares."""
    root = torch.linalg.cholesky(damped(moment, 0.01).double()).T
    if nested.outliers is not None:
        weight = weight - nested.outliers.add_to(torch.zeros_like(weight))
    found = []
    for target, entries in zip(weight.double(), nested.entries(bits).long(), strict=True):
        labels = torch.nn.functional.one_hot(entries, nested.centroids[bits][0].numel()).double()
        table = torch.linalg.lstsq(root @ labels, (root @ target)[:, None], driver="gelsd").solution
        found.append((root @ (target[:, None] - labels @ table)).square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("with_outliers", [False, True])
@pytest.mark.parametrize("group_size", [None, 40])
def test_many_steps_reach_the_least_loss_of_the_codes(group_size: int | None, with_outliers: bool) -> None:
    weight, moment = layer()
    nested = any_precision(weight, group_size, with_outliers)
    own = refit_tables(weight, nested, moment, steps=200)
    for bits in (2, 3, 4):
        least = least_losses(weight, nested, moment, bits)
        # Tables in float16 have an error of their own.
        torch.testing.assert_close(losses(weight, own, moment, bits), least, rtol=0.01, atol=0)
        assert losses(weight, nested, moment, bits).sum() > 1.03 * least.sum()


def test_no_step_raises_a_rows_loss_at_any_precision() -> None:
    weight, moment = layer(rows=12)
    nested = any_precision(weight, None, False)
    seen = [nested, *(refit_tables(weight, nested, moment, steps=steps) for steps in (1, 2, 3, 6, 12))]
    for bits in nested.centroids:
        own = torch.stack([losses(weight, w, moment, bits) for w in seen])
        assert (own[1:] <= own[:-1] * 1.001).all()


def test_codes_outliers_and_entries_without_a_weight_stay() -> None:
    weight, moment = layer()
    nested = any_precision(weight, 40, True)
    own = refit_tables(weight, nested, moment, steps=3)
    assert torch.equal(own.planes, nested.planes)
    assert own.outliers is not None
    assert nested.outliers is not None
    assert torch.equal(own.outliers.values, nested.outliers.values)
    assert (own.in_features, own.group_size) == (nested.in_features, nested.group_size)
    for bits, table in nested.centroids.items():
        used = torch.zeros(table.flatten(1).shape, dtype=torch.bool).scatter_(1, nested.entries(bits).long(), True)
        assert own.centroids[bits].dtype == torch.float16
        assert torch.equal(own.centroids[bits].flatten(1)[~used], table.flatten(1)[~used])
    assert not used.all()
    none = refit_tables(weight, nested, moment, steps=0)
    assert all(torch.equal(none.centroids[bits], table) for bits, table in nested.centroids.items())


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead inputs"])
def test_any_moment_is_handled(kind: str) -> None:
    weight, moment = layer(rank=1 if kind == "rank one" else None)
    if kind == "zero":
        moment = torch.zeros_like(moment)
    if kind == "dead inputs":
        moment[:, 10:20] = 0
        moment[10:20] = 0
    nested = any_precision(weight, None, False)
    own = refit_tables(weight, nested, moment, steps=5)
    for bits in nested.centroids:
        assert (losses(weight, own, moment, bits) <= losses(weight, nested, moment, bits) * 1.001 + 1e-9).all()


def test_bad_input_is_refused() -> None:
    weight, moment = layer()
    nested = any_precision(weight, None, False)
    for change, message in (
        ({"weight": weight[:3]}, r"nested weight \[6, 96\]"),
        ({"moment": moment[:8]}, r"moment \[in, in\]"),
        ({"moment": moment * torch.nan}, "finite"),
        ({"steps": -1}, "steps"),
        ({"damping": 0.0}, "damping"),
    ):
        with pytest.raises(ValueError, match=message):
            refit_tables(**{"weight": weight, "nested": nested, "moment": moment, "steps": 1, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reaches_the_same_losses() -> None:
    weight, moment = layer()
    nested = any_precision(weight, 40, True)
    plain, own = (refit_tables(w, nested, moment, steps=6) for w in (weight, weight.cuda()))
    for bits in nested.centroids:
        ours, theirs = (losses(weight, w, moment, bits) for w in (own, plain))
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
