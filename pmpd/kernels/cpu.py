"""Dequantisation on a CPU: the reference's result, without its 8-byte codes.

It copies table entries and never computes with them, so one compiled loop for each entry width serves every dtype.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pmpd.kernels.reference import WORD_BITS, check_format

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that carry a table entry of so many bytes (numba knows no bfloat16, and little of float16)."""


def dequantize(planes: Tensor, centroids: Tensor, bits: int, in_features: int, group_size: int | None = None) -> Tensor:
    """As :func:`pmpd.kernels.reference.dequantize`, for tensors on a CPU; scratch memory is one row of codes a core."""
    columns = check_format(planes, centroids, bits, in_features, group_size)
    carrier = CARRIERS[centroids.element_size()]
    tables = centroids.contiguous().view(carrier).flatten(1)
    weight = torch.empty(planes.shape[1], in_features, dtype=centroids.dtype)
    _gather(planes[:bits].numpy().view(np.uint32), tables.numpy(), columns, weight.view(carrier).numpy())
    return weight


@njit(parallel=True, cache=True)
def _gather(planes, tables, columns, weight):  # type: ignore[no-untyped-def]
    num_bits, num_rows, num_words = planes.shape
    in_features = weight.shape[1]
    for r in prange(num_rows):
        codes = np.zeros(num_words * WORD_BITS, np.uint8)
        for b in range(num_bits):
            for w in range(num_words):
                word = planes[b, r, w]
                for j in range(WORD_BITS):
                    column = w * WORD_BITS + j
                    codes[column] = (codes[column] << 1) | ((word >> j) & 1)
        table_start = 0
        for start in range(0, in_features, columns):
            for column in range(start, min(start + columns, in_features)):
                weight[r, column] = tables[r, table_start + codes[column]]
            table_start += 1 << num_bits
