"""Where joint quantisation starts: exact k-means of each row under its moment's diagonal, every further bit a split.

Rows are sorted and labelled on the tensors' device and clustered on the CPU, a bounded number of weights at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pmpd.quant import kmeans

BLOCK_WEIGHTS = 1 << 24
"""Weights clustered at a time: about 60 bytes each, so 1 GiB."""


def clusters(
    weight: Tensor, energy: Tensor, precisions: range, group_size: int | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Codes at the last of ``precisions`` and the table of each.

    Args:
        weight: float32 ``[out, in]``.
        energy: float32 ``[in]``, positive: what a squared error in each column counts.
        group_size: columns that share a table; ``None`` for whole rows.

    Returns:
        int64 ``[out, in]``, and for each precision b float32 ``[out, groups, 2**b]``.
    """
    rows, columns = weight.shape
    span = min(group_size or columns, columns)
    whole = columns // span * span
    codes = torch.empty(rows, columns, dtype=torch.int64, device=weight.device)
    tables = {b: weight.new_empty(rows, -(-columns // span), 1 << b) for b in precisions}
    for first in range(0, rows, max(1, BLOCK_WEIGHTS // columns)):
        block = slice(first, first + max(1, BLOCK_WEIGHTS // columns))
        for part, width in ((slice(0, whole), span), (slice(whole, columns), columns - whole)):
            if width == 0:
                continue
            own = weight[block, part]
            groups = slice(part.start // span, part.start // span + own.shape[1] // width)
            order, ordered = _sorted(own.reshape(-1, width), energy[part].expand_as(own).reshape(-1, width))
            cuts = kmeans.seed_clusters(ordered, 1 << precisions[0])
            for b in precisions:
                if b > precisions[0]:
                    cuts = kmeans.split_clusters(ordered, cuts)
                means = torch.from_numpy(kmeans.centroids(ordered, cuts))
                tables[b][block, groups] = means.view(len(own), -1, 1 << b).to(weight)
            codes[block, part] = _labels(order, torch.from_numpy(cuts).to(weight.device)).view(own.shape)
    return codes, tables


def _sorted(values: Tensor, weights: Tensor) -> tuple[Tensor, kmeans.SortedRows]:
    """As :func:`kmeans.sort_rows`, on the tensors' device, where the order stays; weights are positive."""
    ordered, order = values.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    weights = (weights / weights.mean(1, keepdim=True)).clamp_min(kmeans.WEIGHT_FLOOR)
    nowhere = np.empty((0, 0), np.int32)  # clustering asks for values and weights alone
    return order, kmeans.SortedRows(nowhere, _on_cpu(ordered.double()), _on_cpu(weights.double()))


def _labels(order: Tensor, cuts: Tensor) -> Tensor:
    """As :func:`kmeans.labels`, int64 on the tensors' device: how many inner cuts are at or before each place."""
    places = torch.arange(order.shape[1], dtype=cuts.dtype, device=order.device).expand(order.shape)
    labels = torch.searchsorted(cuts[:, 1:-1].contiguous(), places.contiguous(), right=True)
    return torch.empty_like(order).scatter_(1, order, labels)


def _on_cpu(tensor: Tensor) -> kmeans.Floats:
    """Through pinned memory, which a GPU fills several times as fast; PyTorch keeps it for the next time."""
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return target.copy_(tensor).numpy()
