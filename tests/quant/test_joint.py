"""Joint quantisation against a plain float64 definition of its loss and of error feedback."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pmpd.quant import joint_cpu, joint_cuda, joint_torch, quantize_weight
from pmpd.quant.joint import Joint, JointOptions, damped, quantize_jointly

PRECISIONS = range(2, 5)


def layer(rows: int = 6, columns: int = 96, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that are correlated and of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.2 * torch.randn(columns, columns, generator=generator) + torch.diag(
        3 * torch.rand(columns, generator=generator) ** 3
    )
    inputs = torch.randn(rank or 4 * columns, columns, generator=generator) @ mix
    return 0.05 * torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def row_losses(weight: Tensor, values: Tensor, moment: Tensor) -> Tensor:
    error = (weight - values).double()
    return torch.stack([e @ moment.double() @ e for e in error])


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("parent_bits", [4, 6])
def test_no_step_after_assignment_raises_the_loss(group_size: int | None, parent_bits: int) -> None:
    weight, moment = layer()
    precisions = range(2, parent_bits + 1)
    solver = Joint(weight, damped(moment, 0.01), precisions, group_size, JointOptions())

    def total() -> Tensor:
        losses = [row_losses(solver.weight, solver.values(b), solver.moment) for b in precisions]
        return (torch.stack(losses) * solver.costs).sum(0)

    shares = 1 + 1 + 1 + sum(0.25**k for k in range(1, parent_bits - 3))
    torch.testing.assert_close(total(), torch.full((6,), shares, dtype=torch.float64), rtol=1e-4, atol=0)
    solver.assign()
    seen = []
    for step in (lambda: solver.refit(3), solver.descend, lambda: solver.refit(3), solver.descend):
        before = total()
        step()
        seen.append(float((total() / before).max()))
    assert max(seen) <= 1 + 1e-5
    assert min(seen) < 0.99


def test_high_precisions_count_falling_shares_of_their_loss_down_to_a_floor() -> None:
    weight, moment = layer(rows=2, columns=600)  # more weights a row than the 256 values of 8 bits
    solver = Joint(weight, damped(moment, 0.01), range(2, 9), None, JointOptions())
    counted = torch.stack([solver.loss(b) for b in range(2, 9)]) * solver.costs
    shares = torch.tensor([1, 1, 1, 0.25, 0.0625, 0.05, 0.05])
    torch.testing.assert_close(counted, shares[:, None].expand(7, 2), rtol=1e-4, atol=0)


def test_a_layer_of_one_row_descends_across_blocks_of_columns() -> None:
    weight, moment = layer(rows=1, columns=160)
    solver = Joint(weight, damped(moment, 0.01), range(3, 4), None, JointOptions())
    losses = [solver.loss(3)]
    for _ in range(20):
        solver.descend()
        losses.append(solver.loss(3))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    codes, settled = solver.codes.clone(), solver.loss(3)
    for column, code in itertools.product(range(64, 160), range(8)):  # behind the first block too
        solver.codes = codes.clone()
        solver.codes[:, column] = code
        assert (solver.loss(3) >= settled * (1 - 1e-5)).all()


def test_one_precision_is_ordinary_error_feedback() -> None:
    weight, moment = layer(rows=3, columns=40)
    moment = damped(moment, 0.01)
    solver = Joint(weight, moment, range(3, 4), None, JointOptions())
    solver.assign()
    tables = solver.tables[3][:, 0].double().numpy()
    # Column after column, the remaining weights move to the optimum given those that are fixed (float64, one inverse
    # of the remaining block each time).
    h, w = solver.moment.double().numpy(), solver.weight.double().numpy().copy()
    for j in range(40):
        inverse = np.linalg.inv(h[j:, j:])
        for r in range(3):
            q = tables[r][np.argmin((tables[r] - w[r, j]) ** 2)]
            assert solver.values(3)[r, j] == pytest.approx(q, rel=1e-5, abs=1e-7)
            w[r, j:] -= (w[r, j] - q) / inverse[0, 0] * inverse[0]


def test_where_descents_settle_no_single_code_can_be_bettered() -> None:
    weight, moment = layer(rows=4, columns=8)
    solver = Joint(weight, damped(moment, 0.01), PRECISIONS, None, JointOptions())

    def joint_loss() -> Tensor:
        losses = [row_losses(solver.weight, solver.values(b), solver.moment) for b in PRECISIONS]
        return (torch.stack(losses) * solver.costs).sum(0)

    solver.assign()
    for _ in range(10):
        solver.descend()
    settled, codes = joint_loss(), solver.codes.clone()
    for column, code in itertools.product(range(8), range(16)):
        solver.codes = codes.clone()
        solver.codes[:, column] = code
        assert (joint_loss() >= settled * (1 - 1e-5)).all()


def test_prefixes_are_the_codes_of_lower_precisions_and_columns_are_in_their_places() -> None:
    weight, moment = layer()
    quantized = quantize_jointly(weight, moment, parent_bits=6)
    assert sorted(quantized.centroids) == [2, 3, 4, 5, 6]
    shifts = torch.arange(32, dtype=torch.int32)
    planes = ((quantized.planes[..., None] >> shifts) & 1).flatten(2)[..., :96].long()
    for bits in quantized.centroids:
        codes = sum(planes[b] << (bits - 1 - b) for b in range(bits))
        expected = quantized.centroids[bits][:, 0].gather(1, codes)
        assert torch.equal(quantized.dequantize(bits), expected)
    losses = [row_losses(weight, quantized.dequantize(b).float(), moment).sum() for b in PRECISIONS]
    assert losses == sorted(losses, reverse=True)


def test_all_precisions_lose_less_than_k_means_and_the_low_ones_far_less_where_few_are_asked_for() -> None:
    weight, moment = layer(rows=24)
    energy = damped(moment, 0.01).diagonal().expand_as(weight)
    plain = quantize_weight(weight, energy)

    def ratios(parent_bits: int) -> dict[int, float]:
        own = quantize_jointly(weight, moment, parent_bits=parent_bits)
        pairs = {
            b: [row_losses(weight, q.dequantize(b).float(), moment).sum() for q in (own, plain)] for b in own.centroids
        }
        return {b: float(ours / theirs) for b, (ours, theirs) in pairs.items()}

    assert all(ratio < 0.85 for ratio in ratios(4).values())
    assert all(ratio < 1 for ratio in ratios(6).values())


@pytest.mark.parametrize("parent_bits", [4, 6])
def test_outliers_are_taken_where_they_save_most_and_every_precision_gains(parent_bits: int) -> None:
    weight, moment = layer(rows=24)
    weight[3, 7] = 1.0
    few = JointOptions(outlier_share=0.01)
    plain, own = (quantize_jointly(weight, moment, parent_bits=parent_bits, options=o) for o in (JointOptions(), few))
    assert plain.outliers is None
    assert own.outliers is not None
    rows, columns = own.outliers.places()
    assert len(rows) == 23
    assert (3, 7) in zip(rows.tolist(), columns.tolist(), strict=True)
    for bits in own.centroids:
        losses = [row_losses(weight, q.dequantize(bits).float(), moment).sum() for q in (own, plain)]
        assert losses[0] < losses[1]
        assert own.true_bits(bits) == pytest.approx(plain.true_bits(bits) + own.outliers.stored_bits / weight.numel())


@pytest.mark.parametrize("group_size", [None, 40])
def test_compiled_steps_are_the_plain_ones(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = layer(rows=7, columns=100)
    compiled = quantize_jointly(weight, moment, parent_bits=5, group_size=group_size)
    for name in ("assign_block", "descend_block", "summed"):
        monkeypatch.setattr(joint_cpu, name, getattr(joint_torch, name))
    plain = quantize_jointly(weight, moment, parent_bits=5, group_size=group_size)
    for bits in range(2, 6):
        ours, theirs = (row_losses(weight, q.dequantize(bits).float(), damped(moment, 0.01)) for q in (compiled, plain))
        # Sums in another order may tip a tie, after which the codes differ; the losses hardly do.
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0)
        assert float(ours.sum() / theirs.sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead inputs", "huge", "tiny"])
def test_any_moment_is_handled(kind: str) -> None:
    weight, moment = layer(rows=5, columns=48, rank=1 if kind == "rank one" else None)
    if kind == "zero":
        moment = torch.zeros_like(moment)
    if kind == "dead inputs":
        moment[:, 10:20] = 0
        moment[10:20] = 0
    moment = moment * {"huge": 1e20, "tiny": 1e-20}.get(kind, 1)
    quantized = quantize_jointly(weight, moment)
    for bits in range(2, 9):
        assert torch.isfinite(quantized.dequantize(bits)).all()
    # What no input ever reads is still near its weight.
    assert float((quantized.dequantize(8).float() - weight).abs().max()) < 0.05


def test_under_a_moment_of_low_rank_with_dead_inputs_it_loses_less_than_k_means() -> None:
    weight, moment = layer(rows=24, rank=8)
    moment[:, 10:20] = 0
    moment[10:20] = 0
    assert int(torch.linalg.matrix_rank(moment.double(), rtol=1e-5)) == 8  # of float32 products
    own = quantize_jointly(weight, moment, parent_bits=4)
    plain = quantize_weight(weight, damped(moment, 0.01).diagonal().expand_as(weight), parent_bits=4)
    for bits in PRECISIONS:  # under the moment as it is, without damping
        ours, theirs = (row_losses(weight, q.dequantize(bits).float(), moment).sum() for q in (own, plain))
        assert ours < 0.5 * theirs


def test_the_scale_of_the_moment_does_not_matter() -> None:
    weight, moment = layer(rows=4)
    one, other = (quantize_jointly(weight, moment * scale, parent_bits=4) for scale in (1, 1024))
    assert torch.equal(one.planes, other.planes)


def test_constant_rows_and_groups_wider_than_the_layer() -> None:
    weight, moment = layer(rows=4, columns=24)
    weight[0] = 0.25
    quantized = quantize_jointly(weight, moment, parent_bits=4, group_size=64)
    assert torch.equal(quantized.dequantize(3)[0].float(), weight[0])
    assert quantized.centroids[4].shape == (4, 1, 16)


def test_bad_input_is_refused() -> None:
    weight, moment = layer(rows=2, columns=16)
    with pytest.raises(ValueError, match=r"\[out, in\] needs a moment \[in, in\]"):
        quantize_jointly(weight, moment[:8])
    with pytest.raises(ValueError, match="finite"):
        quantize_jointly(weight, moment * torch.inf)
    with pytest.raises(ValueError, match="seed_bits"):
        quantize_jointly(weight, moment, seed_bits=5, parent_bits=4)
    with pytest.raises(ValueError, match="group_size"):
        quantize_jointly(weight, moment, group_size=0)
    for field, value in (("high_share", 0.0), ("damping", 0.0), ("damping", -1.0), ("outlier_share", 1.5)):
        with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
            quantize_jointly(weight, moment, options=JointOptions(**{field: value}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group_size", [None, 40])
def test_the_gpus_steps_are_the_plain_ones_and_every_run_gives_the_same_codes(group_size: int | None) -> None:
    weight, moment = layer(rows=7, columns=100)
    plain = quantize_jointly(weight, moment, parent_bits=6, group_size=group_size)
    first, second = (
        quantize_jointly(weight.cuda(), moment.cuda(), parent_bits=6, group_size=group_size) for _ in range(2)
    )
    assert torch.equal(first.planes, second.planes)
    for bits in range(2, 7):
        assert torch.equal(first.centroids[bits], second.centroids[bits])
        ours, theirs = (row_losses(weight, q.dequantize(bits).float(), damped(moment, 0.01)) for q in (first, plain))
        assert float(ours.sum() / theirs.sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_entries", [4, 16, 256, 700])
def test_sums_by_entry_on_a_gpu(num_entries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 1000, generator=generator)
    entries = torch.randint(0, num_entries, (9, 1000), generator=generator)
    expected = torch.zeros(9, num_entries, dtype=torch.float64).scatter_add_(1, entries, values.double())
    own = joint_cuda.summed(values.cuda(), entries.cuda(), num_entries)
    torch.testing.assert_close(own.cpu().double(), expected, rtol=1e-5, atol=1e-5)
