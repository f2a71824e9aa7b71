"""A random weight in the GPU's form, and how far from float64 its products may be."""

import torch
from torch import Tensor

from pmpd.kernels import cuda, reference
from tests.kernels.definition import random_centroids, random_planes

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case:
    """A random weight of 8 bits in both forms."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        group_size: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: str = "cuda",
    ) -> None:
        groups = -(-in_features // (group_size or in_features))
        self.planes = random_planes(0, 8, out_features, in_features).to(device)
        self.centroids = {
            bits: random_centroids(bits, bits, out_features, groups, dtype).to(device) for bits in range(2, 9)
        }
        self.in_features, self.group_size, self.dtype = in_features, group_size, dtype
        self.weight = cuda.prepare(self.planes, self.centroids, in_features, group_size, dtype)

    def x(self, *shape: int, seed: int = 3) -> Tensor:
        """With one large column, as activations have."""
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        x[..., 5] *= 30
        return x.to(self.planes.device, self.dtype)

    def exact(self, bits: int) -> Tensor:
        tables = self.centroids[bits].double()
        return reference.dequantize(self.planes, tables, bits, self.in_features, self.group_size)

    def check(self, result: Tensor, x: Tensor, bits: int, added: Tensor | float = 0.0) -> None:
        expected = x.double() @ self.exact(bits).T + added
        assert result.dtype == self.dtype
        error = (result.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[self.dtype], f"{bits} bits: {error:.1e}"
