"""The nested format in plain Python, one weight at a time, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dequantized(planes: Tensor, centroids: Tensor, bits: int, in_features: int, group_size: int | None) -> Tensor:
    """float64 ``[out, in_features]``."""
    words = planes.numpy().view(np.uint32).tolist()
    tables = centroids.double().tolist()
    columns = group_size or in_features
    weight = torch.empty(planes.shape[1], in_features, dtype=torch.float64)
    for row in range(planes.shape[1]):
        for column in range(in_features):
            code = 0
            for b in range(bits):
                code = 2 * code + (words[b][row][column // 32] >> (column % 32)) % 2
            weight[row, column] = tables[row][column // columns][code]
    return weight


def random_planes(seed: int, bits: int, out_features: int, in_features: int) -> Tensor:
    """int32 planes of random words, the padding bits of the last word included."""
    generator = np.random.default_rng(seed)
    words = generator.integers(-(2**31), 2**31, size=(bits, out_features, -(-in_features // 32)))
    return torch.from_numpy(words.astype(np.int32))


def random_centroids(seed: int, bits: int, out_features: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Unsorted random tables ``[out, groups, 2**bits]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, groups, 1 << bits, generator=generator).to(dtype)
