import pytest
import torch

from pmpd.kernels import reference
from tests.kernels.definition import dequantized, random_centroids, random_planes

SHAPES = [(3, 64, None), (5, 33, None), (4, 70, 16), (2, 96, 32), (3, 100, 64), (1, 5, 2), (2, 7, 100)]


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_dequantize_is_the_definition(out_features: int, in_features: int, group_size: int | None, bits: int) -> None:
    planes = random_planes(0, bits, out_features, in_features)
    groups = -(-in_features // (group_size or in_features))
    centroids = random_centroids(1, bits, out_features, groups, torch.float64)
    weight = reference.dequantize(planes, centroids, bits, in_features, group_size)
    assert torch.equal(weight, dequantized(planes, centroids, bits, in_features, group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matmul_is_the_product_with_the_dequantized_weight(dtype: torch.dtype) -> None:
    planes = random_planes(0, 4, 6, 70)
    centroids = random_centroids(1, 3, 6, 5, torch.float16)
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = torch.einsum("bti,oi->bto", x.double(), dequantized(planes, centroids, 3, 70, 16))
    result = reference.nested_matmul(x, planes, centroids, 3, 16)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = random_planes(0, 3, 7, 40)
    centroids = random_centroids(1, 3, 7, 1, torch.float32)
    whole = reference.dequantize(planes, centroids, 3, 40)
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", 80)
    assert torch.equal(reference.dequantize(planes, centroids, 3, 40), whole)


def test_higher_planes_are_not_read() -> None:
    planes = random_planes(0, 8, 4, 40)
    centroids = random_centroids(1, 3, 4, 1, torch.float32)
    garbage = planes.clone()
    garbage[3:] = random_planes(9, 5, 4, 40)
    weight = reference.dequantize(planes, centroids, 3, 40)
    assert torch.equal(reference.dequantize(garbage, centroids, 3, 40), weight)
    assert torch.equal(reference.dequantize(planes[:3], centroids, 3, 40), weight)
    garbage[2] = ~planes[2]
    assert not torch.equal(reference.dequantize(garbage, centroids, 3, 40), weight)


@pytest.mark.parametrize(
    ("bits", "in_features", "group_size", "match"),
    [
        (5, 64, None, "bits=5"),
        (0, 64, None, "bits=0"),
        (3, 65, None, "in_features=65"),
        (3, 64, 32, "centroids"),
        (3, 64, 0, "group_size must be"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(bits: int, in_features: int, group_size: int | None, match: str) -> None:
    planes = random_planes(0, 4, 2, 64)
    with pytest.raises(ValueError, match=match):
        reference.dequantize(
            planes, random_centroids(0, max(bits, 1), 2, 1, torch.float32), bits, in_features, group_size
        )


def test_planes_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        reference.dequantize(torch.zeros(2, 2, 2), torch.zeros(2, 1, 4), 2, 64)
