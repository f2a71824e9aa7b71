"""Outliers against plain indexing of dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd.quant.sparse import Outliers, count_within, highest, stored_bits, take_outliers


def matrix(rows: int = 7, columns: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, 30, 350])
def test_the_sparse_term_makes_the_chosen_entries_right_and_leaves_the_others(count: int) -> None:
    weight, dense = matrix(), matrix(seed=1)
    chosen = highest(weight.abs(), count)
    assert int(chosen.sum()) == count
    if 0 < count < weight.numel():
        assert weight[chosen].abs().min() >= weight[~chosen].abs().max()
    outliers = take_outliers(weight, dense, chosen)
    whole = outliers.add_to(dense)
    assert torch.equal(whole[~chosen], dense[~chosen])
    torch.testing.assert_close(whole[chosen], weight[chosen], rtol=0, atol=4e-3)  # float16 of changes up to 6
    assert torch.equal(torch.stack(outliers.places(), 1), chosen.nonzero())


def test_stacked_matrices_have_stacked_outliers() -> None:
    weights = [matrix(rows, seed=rows) for rows in (3, 5)]
    parts = [take_outliers(w, torch.zeros_like(w), highest(w.abs(), 8)) for w in weights]
    both = Outliers.stacked(parts)
    dense = matrix(8, seed=9)
    expected = torch.cat([parts[0].add_to(dense[:3]), parts[1].add_to(dense[3:])])
    assert torch.equal(both.add_to(dense), expected)


def test_rows_in_another_order_take_their_outliers_along() -> None:
    weight = matrix(6)
    outliers = take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), 40))
    order, dense = torch.tensor([4, 1, 5, 0, 3, 2]), matrix(6, seed=9)
    moved = outliers.rows(order)
    assert torch.equal(moved.add_to(dense[order]), outliers.add_to(dense)[order])
    assert torch.equal(torch.stack(moved.places(), 1), moved.add_to(torch.zeros(6, 50)).nonzero())
    assert (moved.columns.dtype, moved.counts.dtype) == (outliers.columns.dtype, outliers.counts.dtype)


def test_of_equal_scores_the_first_are_taken() -> None:
    assert highest(torch.ones(2, 4), 3).tolist() == [[True] * 3 + [False], [False] * 4]


def test_true_bits_count_values_columns_and_counts() -> None:
    weight = matrix(4, 40)
    outliers = take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), 9))
    assert outliers.stored_bits == 9 * (16 + 16) + 4 * 16 == stored_bits(9, 4, 40)
    assert stored_bits(3, 2, 70000) == 3 * (16 + 32) + 2 * 32
    for bits in (0, 63, 64, 95, 96, 97, 500.5, 10**9):
        count = count_within(bits, 4, 40)
        assert count == 0 or stored_bits(count, 4, 40) <= bits
        assert count == 160 or stored_bits(count + 1, 4, 40) > bits


@pytest.mark.parametrize("columns", [(1 << 16) - 1, (1 << 16) + 5])
def test_far_columns_are_kept_whole(columns: int) -> None:
    weight = torch.zeros(2, columns)
    weight[1, -1] = 3
    weight[0, 40000] = 2
    outliers = take_outliers(weight, torch.zeros_like(weight), weight != 0)
    assert torch.equal(outliers.add_to(torch.zeros_like(weight)), weight)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    weight = matrix()
    outliers = take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), 11))
    save_file(outliers.to_tensors("a.b"), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    again = Outliers.from_tensors(tensors, "a.b")
    assert again is not None
    assert torch.equal(again.add_to(weight), outliers.add_to(weight))
    assert Outliers.from_tensors(tensors, "a") is None
    del tensors["a.b.outliers.columns"]
    with pytest.raises(ValueError, match=r"a\.b\.outliers\.columns is missing"):
        Outliers.from_tensors(tensors, "a.b")


def test_values_beyond_float16_are_clamped_and_bad_input_is_refused() -> None:
    weight, dense = torch.tensor([[1e9, 1.0]]), torch.zeros(1, 2)
    assert take_outliers(weight, dense, weight > 2).values.tolist() == [65504.0]
    with pytest.raises(ValueError, match=r"same \[out, in\]"):
        take_outliers(weight, dense, weight[0] > 2)
    with pytest.raises(ValueError, match="count=3"):
        highest(weight, 3)
    with pytest.raises(ValueError, match="finite"):
        highest(weight * torch.inf, 1)
