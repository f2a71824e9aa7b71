import itertools

import numpy as np
import pytest
import torch

from pmpd.kernels import device, reference
from tests.kernels.definition import random_centroids, random_planes


def read(weight: device.DeviceWeight, bits: int, *, in_bytes: bool = False) -> tuple[np.ndarray, set[int]]:
    """The weights as a lane of the kernel finds them, one at a time, and which words of ``packed`` were looked at.

    ``in_bytes``: by the tables of bytes.
    """
    packed, in_features = weight.packed.numpy().view(np.uint32), weight.in_features
    tables, scales = weight.tables[bits].numpy(), weight.scales[bits].numpy()
    if in_bytes:
        assert weight.bytes_at_2 is not None
        tables, scales = (tensor.numpy() for tensor in weight.bytes_at_2)
    tiles = -(-weight.out_features // 16)
    values, touched = np.zeros((weight.out_features, in_features)), set()
    for row in range(weight.out_features):
        tile, half, g = row // 16, row % 16 // 8, row % 8
        for column in range(in_features):
            unit, t, p, n = column // 128, column % 128 // 32, column % 32 // 8, column % 8
            lanes = min(4, in_features // 32 - 4 * unit)
            slot = g * lanes + t
            word = tile * in_features + 128 * unit + 4 * slot + 2 * half + p // 2
            touched.add(word)
            index = (int(packed[word]) >> (4 * n + 2 * (p % 2))) & 3
            for plane in range(2, bits):
                start = tiles * in_features + (plane - 2) * tiles * in_features // 2
                word = start + tile * in_features // 2 + 64 * unit + 2 * slot + half
                touched.add(word)
                bit = (0, 2, 1, 3)[p]
                index |= ((int(packed[word]) >> (4 * n + bit)) & 1) << plane
            entries = tables[tile, column // (weight.group_size or in_features), row % 16]
            if in_bytes:
                high, low = 0, entries[index]
            elif bits <= 5:
                high, low = entries[index], entries[(1 << bits) + index]
            else:
                low, high = entries[2 * index :][:2]
            integer = int(high) * (128 if bits in (4, 5) else 256) + int(low)
            values[row, column] = scales[row, 0] * integer + scales[row, 1]
    return values, touched


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(16, 160, None), (21, 288, 64), (3, 32, None)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_the_kernels_read_is_the_weight(
    out_features: int, in_features: int, group_size: int | None, bits: int
) -> None:
    planes = random_planes(0, 8, out_features, in_features)
    groups = -(-in_features // (group_size or in_features))
    tables = {b: random_centroids(b, b, out_features, groups, torch.float16) for b in range(2, 9)}
    weight = device.prepare(planes, tables, in_features, group_size, torch.float16)
    expected = reference.dequantize(planes, tables[bits].double(), bits, in_features, group_size)
    values, _ = read(weight, bits)
    error = np.abs(values - expected.numpy()).max(axis=1)
    span = tables[bits].double().amax(dim=(1, 2)) - tables[bits].double().amin(dim=(1, 2))
    assert (error <= span.numpy() * 2.0 ** (-14.9 if bits in (4, 5) else -16.9)).all()


def test_tables_of_bytes_are_nearly_the_same_weight() -> None:
    planes = random_planes(0, 3, 37, 288)
    tables = {b: random_centroids(b, b, 37, 1, torch.float16) for b in (2, 3)}
    weight = device.prepare(planes, tables, 288, None, torch.float16)
    expected = reference.dequantize(planes, tables[2].double(), 2, 288).numpy()
    values, _ = read(weight, 2, in_bytes=True)
    assert 0 < np.linalg.norm(values - expected) < device.BYTE_ERROR * np.linalg.norm(expected)


@pytest.mark.parametrize("values", [(0, 1, 2, 3), (-5, -4, 2, 15), (2, 2, 2, 2)])
def test_values_that_are_multiples_of_a_step_are_exact_in_bytes(values: tuple[int, ...]) -> None:
    table = 0.25 * torch.tensor([values], dtype=torch.float64) + 3
    integers, scales, error = device._nearest_bytes(
        table, torch.tensor([[5.0, 1.0, 7.0, 2.0]], dtype=torch.float64) / 15
    )
    assert torch.equal(integers, integers.round().clamp(0, 255))
    assert torch.allclose(scales[:, :1] * integers + scales[:, 1:], table, rtol=0, atol=1e-12)
    assert float(error) < 1e-20


def test_bytes_are_fitted_to_the_codes_that_a_row_has() -> None:
    """Against least squares for every pair of inner integers within one of the nearest, for each scale."""
    table = torch.tensor([[-1.7, -0.31, 0.42, 1.1]], dtype=torch.float64)
    shares = torch.tensor([[0.03, 0.4, 0.5, 0.07]], dtype=torch.float64)
    integers, scales, error = device._nearest_bytes(table, shares)
    found = scales[:, :1] * integers + scales[:, 1:]
    assert float(error) == pytest.approx(float((shares * (found - table) ** 2).sum()))
    weights = shares[0].sqrt().numpy()
    least = np.inf
    for largest in range(128, 256):
        near = ((table[0] - table[0, 0]) / (table[0, 3] - table[0, 0]) * largest).round()
        for one, other in itertools.product((-1, 0, 1), repeat=2):
            moved = near.numpy() + np.array([0, one, other, 0])
            columns = np.stack([moved, np.ones(4)], axis=1) * weights[:, None]
            least = min(least, float(np.linalg.lstsq(columns, table[0].numpy() * weights)[1][0]))
    assert float(error) == pytest.approx(least)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_a_weight_that_bytes_would_harm_has_none(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    """One weight of a row is a hundred times the others, and between its value and theirs there are 255 steps.

    So it is in half of the rows, which may be small beside the others.
    """
    planes = torch.full((2, 16, 64), 0x0F0F0F0F)
    planes[1] = ~planes[0]  # codes 1 and 2
    planes[:, :, 0] |= 1
    planes, harmed = planes.int(), torch.tensor([0.0, 1.0, 1.3, 100.0]).repeat(16, 1, 1)
    harmed[8:] = harmed[8:].clamp(max=2)
    harmed[:8] *= scale
    caplog.set_level("INFO")
    assert (device.prepare(planes, {2: harmed}, 2048, None, torch.float16).bytes_at_2 is None) == (scale > 0)
    assert ("a weight of 16 rows has no tables of bytes" in caplog.text) == (scale > 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_has_no_tables_of_bytes(value: float) -> None:
    table = random_centroids(2, 2, 16, 1, torch.float16)
    table[3, 0, 1] = value
    weight = device.prepare(random_planes(0, 2, 16, 64), {2: table}, 64, None, torch.float16)
    assert weight.bytes_at_2 is None


def test_groups_and_other_precisions_have_no_tables_of_bytes() -> None:
    planes = random_planes(0, 3, 16, 64)
    in_groups = {2: random_centroids(0, 2, 16, 2, torch.float16)}
    assert device.prepare(planes, in_groups, 64, 32, torch.float16).bytes_at_2 is None
    three = {3: random_centroids(0, 3, 16, 1, torch.float16)}
    assert device.prepare(planes, three, 64, None, torch.float16).bytes_at_2 is None


def test_codes_of_two_bits_are_counted() -> None:
    planes = random_planes(0, 5, 7, 96)
    planes[:2, 0], planes[0, 1] = -1, 0
    codes = reference.dequantize(planes, torch.arange(4.0).expand(7, 1, 4), 2, 96)
    expected = torch.stack([(codes == code).sum(1) for code in range(4)], dim=1)
    assert torch.equal(device._shares(planes), expected.double() / 96)


def test_the_words_of_pairs_make_planes_in_the_order_of_the_others() -> None:
    """All planes alike, so whatever bit of a plane a lane's word has, the words of the other planes have it there."""
    planes = random_planes(0, 1, 16, 128).expand(4, -1, -1)
    weight = device.prepare(planes, {4: random_centroids(0, 4, 16, 1, torch.float16)}, 128, None, torch.float16)
    words = weight.packed.numpy().view(np.uint32)
    first, second = words[:128].reshape(32, 2, 2).transpose(2, 0, 1)  # [lane, row half] of both words of pairs
    third, fourth = words[128:].reshape(2, 32, 2)
    even, odd = np.uint32(0x55555555), np.uint32(0xAAAAAAAA)
    lower = (second << np.uint32(1)) & odd | first & even
    upper = second & odd | (first >> np.uint32(1)) & even
    for word in (lower, upper, fourth):
        assert (word == third).all()


@pytest.mark.parametrize("in_features", [32, 160, 256])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_read_an_eighth_of_a_byte_a_weight_each_and_nothing_else(in_features: int, bits: int) -> None:
    planes = random_planes(0, 8, 32, in_features)
    tables = {b: random_centroids(b, b, 32, 1, torch.float16) for b in range(2, 9)}
    weight = device.prepare(planes, tables, in_features, None, torch.float16)
    _, touched = read(weight, bits)
    assert touched == set(range(32 * in_features * bits // 32))  # the first words, each bit of them a weight's
    assert weight.packed.numel() * 4 == 32 * in_features * 8 // 8


def test_memory_is_the_planes_of_the_highest_precision_and_small_tables() -> None:
    planes = random_planes(0, 8, 64, 4096)
    tables = {b: random_centroids(b, b, 64, 1, torch.float16) for b in (2, 3, 4)}
    weight = device.prepare(planes, tables, 4096, None, torch.float16)
    assert weight.packed.numel() * 4 == 64 * 4096 * 4 // 8
    assert weight.bytes <= 64 * (4096 * 4 // 8 + 2 * (4 + 8 + 16) + 3 * 8 + 4 + 8)


def test_concatenated_rows_are_prepared_as_one_weight() -> None:
    parts = [random_planes(seed, 4, 32, 128) for seed in (0, 1)]
    tables = [{3: random_centroids(seed, 3, 32, 1, torch.float16)} for seed in (2, 3)]
    apart = [device.prepare(p, t, 128, None, torch.float16) for p, t in zip(parts, tables, strict=True)]
    fused = {3: torch.cat([t[3] for t in tables])}
    together = device.prepare(torch.cat(parts, dim=1), fused, 128, None, torch.float16)
    values = np.concatenate([read(weight, 3)[0] for weight in apart])
    assert np.array_equal(read(together, 3)[0], values)


def test_equal_entries_and_a_single_group_are_fine() -> None:
    planes = random_planes(0, 2, 16, 64)
    weight = device.prepare(planes, {2: torch.full((16, 1, 4), 0.5)}, 64, 64, torch.bfloat16)
    assert weight.group_size is None
    assert (read(weight, 2)[0] == 0.5).all()


@pytest.mark.parametrize(
    ("bits", "in_features", "group_size", "dtype", "match"),
    [
        (3, 64, None, torch.float32, "dtype=torch.float32"),
        (1, 64, None, torch.float16, r"bits=\[1\]"),
        (3, 65, None, torch.float16, "in_features=65"),
        (3, 1 << 17, None, torch.float16, "in_features=131072"),
        (3, 64, 48, torch.float16, "group_size=48"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(
    bits: int, in_features: int, group_size: int | None, dtype: torch.dtype, match: str
) -> None:
    groups = -(-in_features // (group_size or in_features))
    planes = random_planes(0, 4, 2, in_features)
    with pytest.raises(ValueError, match=match):
        device.prepare(planes, {bits: random_centroids(0, bits, 2, groups, dtype)}, in_features, group_size, dtype)
