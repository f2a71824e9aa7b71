"""Tuning of tables against plain differentiation, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from pmpd.models import attach, block_linears, load_model
from pmpd.quant import NestedWeight, highest, quantize_weight, take_outliers
from pmpd.quant.tuning import _Product, tune_tables
from tests.tiny import tiny_model_dir

WINDOWS = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(0))


def nested_model(tmp_path: Path, with_outliers: bool = False):  # type: ignore[no-untyped-def]
    model = load_model(tiny_model_dir(tmp_path / "model", "llama"), torch.float32)
    tensors = {}
    for name, layer in block_linears(model).items():
        weight = layer.weight.detach()
        own = quantize_weight(weight, torch.ones_like(weight), parent_bits=4)
        if with_outliers:
            chosen = highest(weight.abs(), 20)
            outliers = take_outliers(weight, own.dequantize(3, torch.float32), chosen)
            own = NestedWeight(own.planes, own.centroids, own.in_features, own.group_size, outliers)
        tensors |= own.to_tensors(name)
    save_file(tensors, tmp_path / "block_000.safetensors")
    return model, attach(model, tmp_path)


def test_the_product_and_its_gradients_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 8, generator=generator, requires_grad=True)
    entries = torch.randint(0, 8, (5, 12), generator=generator).to(torch.uint8)
    x = torch.randn(2, 3, 12, generator=generator, requires_grad=True)
    weight = torch.randn(5, 12, generator=generator)
    for outliers in (None, take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), 4))):
        matrix = table.double().gather(1, entries.long())
        if outliers is not None:
            matrix = outliers.add_to(matrix)
        expected = functional.linear(x.double(), matrix)
        own = _Product.apply(x, table, entries, outliers)
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-5)
        pull = torch.randn(own.shape, generator=generator)
        for a, b in zip(
            torch.autograd.grad(own, (x, table), pull),
            torch.autograd.grad(expected, (x, table), pull.double()),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_outliers", [False, True])
def test_tuning_brings_the_model_nearer_to_itself_and_leaves_other_precisions(
    tmp_path: Path, with_outliers: bool
) -> None:
    model, cell = nested_model(tmp_path, with_outliers)
    before = {b: [layer.weight_at(b).clone() for layer in cell.layers] for b in (2, 3, 4)}
    seen = tune_tables(model, cell, WINDOWS, 2, steps=30, rate=0.02, batch_size=6)
    assert len(seen) == 30
    assert seen[-1] < 0.8 * seen[0]
    after = {b: [layer.weight_at(b) for layer in cell.layers] for b in (2, 3, 4)}
    for bits in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(before[bits], after[bits], strict=True))
    assert not torch.equal(before[2][0], after[2][0])
    # What a forward then computes is what was tuned.
    again = tune_tables(model, cell, WINDOWS, 2, steps=1, rate=1e-9, batch_size=6)
    assert again[0] == pytest.approx(seen[-1], rel=0.05)
    cell.bits = 16
    with torch.no_grad():
        wanted = functional.log_softmax(model(input_ids=WINDOWS).logits, -1)
        cell.bits = 2
        own = functional.log_softmax(model(input_ids=WINDOWS).logits, -1)
    expected = (wanted.exp() * (wanted - own)).sum(-1).double().mean()
    assert again[0] == pytest.approx(float(expected), rel=1e-3)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_no_steps_leave_the_tables(tmp_path: Path) -> None:
    model, cell = nested_model(tmp_path)
    before = [layer.weight_at(2).clone() for layer in cell.layers]
    assert tune_tables(model, cell, WINDOWS, 2, steps=0, rate=0.02) == []
    assert all(torch.equal(layer.weight_at(2), old) for layer, old in zip(cell.layers, before, strict=True))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model, cell = nested_model(tmp_path)
    with pytest.raises(ValueError, match="windows"):
        tune_tables(model, cell, WINDOWS[:0], 2, steps=1, rate=0.1)
    with pytest.raises(ValueError, match="lower rate"):
        tune_tables(model, cell, WINDOWS, 2, steps=5, rate=float("inf"))
