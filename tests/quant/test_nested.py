import itertools
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd import kernels
from pmpd.quant import nested
from pmpd.quant.nested import NestedWeight, _pack_there, pack, quantize_weight
from tests.kernels.definition import dequantized
from tests.quant.test_kmeans import least_error


def random_weight(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(out_features, in_features, generator=generator)
    return weight, torch.rand(out_features, in_features, generator=generator) ** 4


def codes_of(quantized: NestedWeight, bits: int) -> Tensor:
    """int64 ``[out, in]``, read through tables that hold their own index."""
    groups = quantized.centroids[quantized.seed_bits].shape[1]
    tables = torch.arange(1 << bits).expand(quantized.out_features, groups, -1)
    return kernels.dequantize(quantized.planes, tables, bits, quantized.in_features, quantized.group_size)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16), bits=st.integers(1, 8), out_features=st.integers(1, 6), in_features=st.integers(1, 100)
)
def test_packed_codes_unpack_to_themselves_and_their_prefixes(
    seed: int, bits: int, out_features: int, in_features: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (out_features, in_features)).astype(np.uint8)
    planes = pack(torch.from_numpy(codes), bits)
    assert torch.equal(planes, _pack_there(torch.from_numpy(codes), bits))
    assert planes.shape == (bits, out_features, -(-in_features // 32))
    for b in range(1, bits + 1):
        tables = torch.arange(1 << b).expand(out_features, 1, -1)
        unpacked = kernels.dequantize(planes, tables, b, in_features)
        assert torch.equal(unpacked, torch.from_numpy(codes >> (bits - b)).long())


@pytest.mark.parametrize(
    ("in_features", "group_size", "groups"),
    [(96, None, 1), (70, None, 1), (96, 32, 3), (70, 32, 3), (45, 7, 7), (33, 32, 2), (20, 64, 1), (1, None, 1)],
)
def test_every_precision_is_the_definition_and_packs_to_size(
    in_features: int, group_size: int | None, groups: int
) -> None:
    weight, sensitivity = random_weight(5, in_features)
    quantized = quantize_weight(weight, sensitivity, seed_bits=2, parent_bits=6, group_size=group_size)
    assert quantized.planes.shape == (6, 5, -(-in_features // 32))
    assert quantized.planes.dtype == torch.int32
    assert (quantized.out_features, quantized.seed_bits, quantized.parent_bits) == (5, 2, 6)
    assert sorted(quantized.centroids) == [2, 3, 4, 5, 6]
    for bits, table in quantized.centroids.items():
        assert table.shape == (5, groups, 1 << bits)
        assert table.dtype == torch.float16
        expected = dequantized(quantized.planes, table, bits, in_features, quantized.group_size)
        assert torch.equal(quantized.dequantize(bits, torch.float64), expected)


@pytest.mark.parametrize("group_size", [None, 30])
def test_seed_error_is_within_a_percent_of_the_least(group_size: int | None) -> None:
    weight, sensitivity = random_weight(3, 50)
    quantized = quantize_weight(weight, sensitivity, seed_bits=2, parent_bits=3, group_size=group_size)
    squared = sensitivity.double() * (quantized.dequantize(2, torch.float64) - weight.double()) ** 2
    for start in range(0, 50, group_size or 50):
        part = slice(start, start + (group_size or 50))
        for row in range(3):
            order = weight[row, part].argsort()
            values = weight[row, part][order].double().numpy()
            weights = sensitivity[row, part][order].double().numpy()
            assert squared[row, part].sum().item() <= 1.01 * least_error(values, weights, 4)


def test_error_does_not_rise_with_another_bit() -> None:
    weight, sensitivity = random_weight(20, 300)
    quantized = quantize_weight(weight, sensitivity)
    error = [
        (sensitivity * (quantized.dequantize(bits, torch.float32) - weight) ** 2).sum(1).double()
        for bits in range(2, 9)
    ]
    # A float16 centroid is off by at most 2**-11 of its value.
    rounding = (sensitivity * (weight.abs() * 2**-10) ** 2).sum(1).double()
    for coarse, fine in pairwise(error):
        assert (fine <= coarse + rounding).all()
    assert error[-1].sum() < error[0].sum() / 500


def test_more_precision_only_appends_bits_to_a_code() -> None:
    quantized = quantize_weight(*random_weight(6, 77), group_size=30)
    for bits in range(2, 8):
        assert torch.equal(codes_of(quantized, bits + 1) >> 1, codes_of(quantized, bits))


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_reading_b_bits_touches_b_planes(bits: int) -> None:
    quantized = quantize_weight(*random_weight(6, 77), group_size=30)
    expected = quantized.dequantize(bits)
    alone = NestedWeight(quantized.planes[:bits].clone(), {bits: quantized.centroids[bits].clone()}, 77, 30)
    assert torch.equal(alone.dequantize(bits), expected)
    assert torch.equal(quantized.prefix(bits).dequantize(bits), expected)
    assert quantized.prefix(bits).parent_bits == bits
    quantized.planes[bits:] = 0x5A5A5A5A
    for b in range(bits + 1, 9):
        quantized.centroids[b].fill_(float("nan"))
    assert torch.equal(quantized.dequantize(bits), expected)


def test_groups_are_quantized_as_rows_of_their_own() -> None:
    weight, sensitivity = random_weight(4, 50)
    quantized = quantize_weight(weight, sensitivity, group_size=20)
    for group, part in enumerate((slice(0, 20), slice(20, 40), slice(40, 50))):
        alone = quantize_weight(weight[:, part], sensitivity[:, part])
        for bits in range(2, 9):
            assert torch.equal(quantized.dequantize(bits)[:, part], alone.dequantize(bits))
            assert torch.equal(quantized.centroids[bits][:, group], alone.centroids[bits][:, 0])


def test_blocks_of_rows_and_repeats_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, sensitivity = random_weight(7, 40)
    whole = quantize_weight(weight, sensitivity, group_size=16)
    monkeypatch.setattr(nested, "BLOCK_WEIGHTS", 80)
    blocks = quantize_weight(weight, sensitivity, group_size=16)
    assert torch.equal(whole.planes, blocks.planes)
    assert all(torch.equal(whole.centroids[bits], blocks.centroids[bits]) for bits in whole.centroids)


def test_values_beyond_float16_are_clamped() -> None:
    weight = torch.tensor([[-1e6, -1.0, 1.0, 1e6]])
    quantized = quantize_weight(weight, torch.ones(1, 4), parent_bits=3)
    assert quantized.dequantize(2).tolist() == [[-65504.0, -1.0, 1.0, 65504.0]]


@pytest.mark.parametrize("fill", [0.0, 0.25])
def test_constant_and_insensitive_rows_are_exact(fill: float) -> None:
    quantized = quantize_weight(torch.full((2, 40), fill), torch.zeros(2, 40), group_size=16)
    for bits in range(2, 9):
        assert (quantized.dequantize(bits) == fill).all()
        assert torch.isfinite(quantized.centroids[bits]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_are_taken_for_their_values(dtype: torch.dtype) -> None:
    weight, sensitivity = random_weight(3, 40)
    weight = weight.to(dtype)
    quantized = quantize_weight(weight, sensitivity.to(torch.bfloat16))
    expected = quantize_weight(weight.float(), sensitivity.to(torch.bfloat16).float())
    assert torch.equal(quantized.planes, expected.planes)


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_weight_survives_a_file(tmp_path: Path, group_size: int | None) -> None:
    quantized = quantize_weight(*random_weight(4, 40), group_size=group_size)
    other = quantize_weight(*random_weight(3, 33, seed=1))
    save_file(quantized.to_tensors("layers.1") | other.to_tensors("layers.10"), tmp_path / "x.safetensors")
    loaded = NestedWeight.from_tensors(load_file(tmp_path / "x.safetensors"), "layers.1")
    assert (loaded.in_features, loaded.group_size) == (40, group_size)
    assert list(loaded.centroids) == list(range(2, 9))
    for bits in range(2, 9):
        assert torch.equal(loaded.dequantize(bits), quantized.dequantize(bits))


@pytest.mark.parametrize("group_size", [None, 16])
def test_unsorted_tables_load_and_decode_right(tmp_path: Path, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group_size is None else 3
    codes = torch.randint(0, 32, (4, 40), generator=generator)
    tables = {b: torch.randn(4, groups, 1 << b, generator=generator).half() for b in range(2, 6)}
    assert all((table.diff(dim=2) < 0).any() for table in tables.values())
    made = NestedWeight(pack(codes.to(torch.uint8), 5), tables, 40, group_size)
    save_file(made.to_tensors("a"), tmp_path / "x.safetensors")
    loaded = NestedWeight.from_tensors(load_file(tmp_path / "x.safetensors"), "a")
    for bits in range(2, 6):
        expected = torch.empty(4, 40, dtype=torch.float16)
        for row, column in itertools.product(range(4), range(40)):
            group = 0 if group_size is None else column // group_size
            expected[row, column] = tables[bits][row, group, codes[row, column] >> (5 - bits)]
        assert torch.equal(loaded.dequantize(bits), expected)
        assert torch.equal(loaded.prefix(bits).dequantize(bits), expected)


def test_a_missing_tensor_is_named() -> None:
    tensors = quantize_weight(*random_weight(4, 40)).to_tensors("a")
    with pytest.raises(ValueError, match=r"b\.planes"):
        NestedWeight.from_tensors(tensors, "b")
    del tensors["a.layout"]
    with pytest.raises(ValueError, match=r"a\.layout"):
        NestedWeight.from_tensors(tensors, "a")


def test_a_precision_that_is_not_there_is_refused() -> None:
    quantized = quantize_weight(*random_weight(4, 40), seed_bits=3, parent_bits=4)
    for bits in (2, 5, 16):
        with pytest.raises(ValueError, match=rf"bits={bits} .*\[3, 4\]"):
            quantized.dequantize(bits)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed_bits": 0}, "seed_bits"),
        ({"seed_bits": 5, "parent_bits": 4}, "got 5 and 4"),
        ({"parent_bits": 9}, "parent_bits"),
        ({"group_size": 0}, "group_size"),
        ({"solver": "best"}, "solver"),
        ({"sensitivity": torch.ones(4, 39)}, r"\[4, 39\]"),
        ({"sensitivity": -torch.ones(4, 40)}, "not negative"),
        ({"weight": torch.full((4, 40), torch.nan)}, "finite"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, match: str) -> None:
    arguments = {"weight": torch.ones(4, 40), "sensitivity": torch.ones(4, 40)} | changes
    with pytest.raises(ValueError, match=match):
        quantize_weight(**arguments)
