"""Where joint quantisation starts: k-means of each row under its moment's diagonal, below the codes that are there.

On the tensors' device, all rows at once. Each further bit cuts every cluster at its mean, then Lloyd's iterations
move the cut; nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ITERATIONS = 4

Summed = Callable[[Tensor, Tensor, int], Tensor]
"""As :func:`pmpd.quant.joint_torch.summed`."""


def split_clusters(
    weight: Tensor, energy: Tensor, codes: Tensor, below: int, bits: Sequence[int], group_of: Tensor, summed: Summed
) -> tuple[Tensor, dict[int, Tensor]]:
    """Codes of ``bits[-1]`` bits that go on from ``codes`` of ``below``, and the flat table of each precision.

    With ``below`` 0 the clusters of ``bits[0]`` are free; every other bit splits clusters.

    Args:
        weight: float32 ``[out, in]``.
        energy: float32 ``[in]``, positive: what a squared error in each column counts.
        codes: int64 ``[out, in]``.
        group_of: int64 ``[in]``, the group of columns, each with tables of its own.

    Returns:
        int64 ``[out, in]``, and for each precision b float32 ``[out, groups * 2**b]``. An empty cluster has the value
        of the one that it was split from.
    """
    groups = int(group_of.max()) + 1
    mass = energy.expand_as(weight).contiguous()
    moment = mass * weight

    def means(codes: Tensor, b: int, fallback: Tensor) -> Tensor:
        entries, size = codes + (group_of << b), groups << b
        total = summed(mass, entries, size)
        return torch.where(total > 0, summed(moment, entries, size) / total, fallback)

    def nearer(codes: Tensor, b: int, table: Tensor) -> Tensor:
        """The nearer half of each cluster of ``b - 1`` bits."""
        left = (codes >> 1 << 1) + (group_of << b)
        to_left, to_right = ((weight - table.gather(1, left + half)).abs() for half in (0, 1))
        return (codes >> 1 << 1) + (to_right < to_left)

    tables = {}
    table = means(codes, below, weight.new_zeros(len(weight), groups << below))
    for b in range(below + 1, bits[-1] + 1):
        parents = table.gather(1, codes + (group_of << b - 1))
        codes = 2 * codes + (weight > parents)
        table = means(codes, b, table.repeat_interleave(2, 1))
        for _ in range(ITERATIONS):
            codes = nearer(codes, b, table)
            table = means(codes, b, table)
        if b == bits[0] and not below:
            codes, table = _free(weight, codes, b, table, group_of, means)
        if b >= bits[0]:
            tables[b] = table
    return codes, tables


def _free(
    weight: Tensor,
    codes: Tensor,
    b: int,
    table: Tensor,
    group_of: Tensor,
    means: Callable[[Tensor, int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations over all clusters of ``b`` bits; a value may only move to a neighbouring cluster at a time."""
    for _ in range(4 * ITERATIONS):
        near = codes + torch.arange(-1, 2, device=codes.device)[:, None, None]
        near = near.clamp(0, (1 << b) - 1)
        away = torch.stack([(weight - table.gather(1, c + (group_of << b))).abs() for c in near])
        codes = near.gather(0, away.argmin(0, keepdim=True))[0]
        table = means(codes, b, table)
    return codes, table
