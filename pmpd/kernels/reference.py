"""What the nested format means: plain PyTorch, the definition that every faster kernel is tested against.

It knows nothing about how codes and tables were found, nor about layers.

The format. A weight's code at b bits is the number that its bits in ``planes[0] .. planes[b - 1]`` spell, most
significant first; bit j of word w of a plane belongs to column ``32 * w + j``. Its value is entry ``code`` of the
table ``centroids[row, group]``, where group g covers columns ``g * group_size`` up to the next group or the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
BLOCK_WEIGHTS = 1 << 20
"""Weights decoded at a time: PyTorch gathers by int64, so codes take 8 bytes each, and a block about 24 MiB."""


def check_format(planes: Tensor, centroids: Tensor, bits: int, in_features: int, group_size: int | None) -> int:
    """Columns in a group, once the shapes are known to agree.

    Raises:
        ValueError: too few planes, or a table or plane of the wrong shape or type.
    """
    if planes.dtype != torch.int32 or planes.dim() != 3:
        raise ValueError(f"planes must be int32 [bits, out, words], got {planes.dtype} {list(planes.shape)}")
    if not 1 <= bits <= planes.shape[0]:
        raise ValueError(f"bits must be in 1..{planes.shape[0]} (the planes there are), got bits={bits}")
    if planes.shape[2] != -(-in_features // WORD_BITS):
        raise ValueError(f"in_features={in_features} does not fit planes of {planes.shape[2]} words of {WORD_BITS}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be >= 1 or None, got {group_size}")
    columns = in_features if group_size is None else group_size
    expected = [planes.shape[1], -(-in_features // columns), 1 << bits]
    if list(centroids.shape) != expected:
        raise ValueError(f"centroids of {bits} bits must be {expected}, got {list(centroids.shape)}")
    return columns


def dequantize(planes: Tensor, centroids: Tensor, bits: int, in_features: int, group_size: int | None = None) -> Tensor:
    """The weight matrix at ``bits`` bits, of the tables' dtype.

    Args:
        planes: int32 ``[>= bits, out, ceil(in_features / 32)]``; only the first ``bits`` are read.
        centroids: ``[out, groups, 2**bits]``, the tables of this precision.
        group_size: columns sharing a table; ``None`` for whole rows. The last group may be shorter.

    Returns:
        ``[out, in_features]``.

    Raises:
        ValueError: shapes that do not agree.
    """
    columns = check_format(planes, centroids, bits, in_features, group_size)
    out_features = planes.shape[1]
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=planes.device)
    table_start = (torch.arange(in_features, device=planes.device) // columns) << bits
    weight = torch.empty(out_features, in_features, dtype=centroids.dtype, device=planes.device)
    rows = max(1, BLOCK_WEIGHTS // in_features)
    for start in range(0, out_features, rows):
        block = slice(start, start + rows)
        codes = torch.zeros(weight[block].shape, dtype=torch.int64, device=planes.device)
        for plane in planes[:bits]:
            plane_bits = (plane[block, :, None] >> shifts) & 1
            codes = (codes << 1) | plane_bits.flatten(1)[:, :in_features]
        torch.gather(centroids[block].flatten(1), 1, codes + table_start, out=weight[block])
    return weight


def nested_matmul(x: Tensor, planes: Tensor, centroids: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """``x @ W.T`` with W the weight at ``bits`` bits, computed in the dtype of ``x``.

    Args:
        x: ``[..., in_features]``.
        planes, centroids, bits, group_size: as in :func:`dequantize`.

    Returns:
        ``[..., out]``.
    """
    weight = dequantize(planes, centroids.to(x.dtype), bits, x.shape[-1], group_size)
    return x @ weight.T
