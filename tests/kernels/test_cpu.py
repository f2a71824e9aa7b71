import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd import kernels
from pmpd.kernels import cpu, reference
from tests.kernels.definition import dequantized, random_centroids, random_planes


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(1, 8),
    higher=st.integers(0, 2),
    out_features=st.integers(1, 9),
    in_features=st.integers(1, 140),
    group_size=st.one_of(st.none(), st.integers(1, 150)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_cpu_kernel_copies_what_the_reference_does(
    seed: int,
    bits: int,
    higher: int,
    out_features: int,
    in_features: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> None:
    planes = random_planes(seed, bits + higher, out_features, in_features)
    groups = -(-in_features // (group_size or in_features))
    centroids = random_centroids(seed, bits, out_features, groups, dtype)
    result = cpu.dequantize(planes, centroids, bits, in_features, group_size)
    assert result.dtype == dtype
    assert torch.equal(result, reference.dequantize(planes, centroids, bits, in_features, group_size))


def test_dispatch_is_the_definition() -> None:
    planes = random_planes(0, 4, 6, 70)
    centroids = random_centroids(1, 4, 6, 5, torch.float16)
    weight = dequantized(planes, centroids, 4, 70, 16)
    assert torch.equal(kernels.dequantize(planes, centroids, 4, 70, 16).double(), weight)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(2))
    product = kernels.nested_matmul(x, planes, centroids, 4, 16)
    torch.testing.assert_close(product.double(), x.double() @ weight.T, rtol=0, atol=1e-5)


def test_higher_planes_are_not_read() -> None:
    planes = random_planes(0, 8, 4, 40)
    centroids = random_centroids(1, 3, 4, 1, torch.float32)
    weight = cpu.dequantize(planes[:3].clone(), centroids, 3, 40)
    assert torch.equal(cpu.dequantize(planes, centroids, 3, 40), weight)


def test_shapes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features=65"):
        cpu.dequantize(random_planes(0, 4, 2, 64), random_centroids(0, 3, 2, 1, torch.float32), 3, 65)
