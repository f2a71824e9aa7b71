import pytest
import torch

from pmpd import kernels
from tests.kernels.definition import dequantized, random_centroids, random_planes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("in_features", "group_size"), [(70, 16), (100, None), (64, 64)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dequantized_on_a_gpu_is_the_definition(in_features: int, group_size: int | None, bits: int) -> None:
    planes = random_planes(0, bits, 6, in_features)
    centroids = random_centroids(1, bits, 6, -(-in_features // (group_size or in_features)), torch.float16)
    weight = dequantized(planes, centroids, bits, in_features, group_size)
    result = kernels.dequantize(planes.cuda(), centroids.cuda(), bits, in_features, group_size)
    assert torch.equal(result.cpu().double(), weight)


def test_multiplied_on_a_gpu_is_the_definition_and_float32_is_refused() -> None:
    planes, centroids = random_planes(0, 4, 6, 96), random_centroids(1, 3, 6, 3, torch.float16)
    weight = dequantized(planes, centroids, 3, 96, 32)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2)).half()
    product = kernels.nested_matmul(x.cuda(), planes.cuda(), centroids.cuda(), 3, 32)
    exact = x.double() @ weight.T
    assert (product.cpu().double() - exact).norm() < 2e-3 * exact.norm()
    with pytest.raises(ValueError, match="float32"):
        kernels.nested_matmul(x.float().cuda(), planes.cuda(), centroids.cuda(), 3, 32)
