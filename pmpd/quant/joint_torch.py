"""The column steps of joint quantisation in plain PyTorch, all rows at once: the definition of what ``joint_cpu`` and
``joint_cuda`` compute. Precisions are consecutive, and their tables lie end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _nearest(
    targets: Tensor,
    costs: Tensor,
    table: Tensor,
    bits: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The code ``[rows]`` of ``bits[-1]`` bits of least summed cost, the first of equals, and its values
    ``[precisions, rows]``.

    ``costs[s] * (targets[s] - value)**2`` is what a value costs at the s-th precision.
    """
    entries = table.split([1 << b for b in bits], dim=1)
    total = torch.zeros_like(entries[0])
    for s in range(len(bits)):
        cost = (targets[s][:, None] - entries[s]).square() * costs[s][:, None]
        total = cost + (total.repeat_interleave(2, dim=1) if s else total)
    code = total.argmin(1)
    values = [e.gather(1, (code >> (bits[-1] - b))[:, None])[:, 0] for e, b in zip(entries, bits, strict=True)]
    return code, torch.stack(values)


def assign_block(
    moved: Tensor,
    errors: Tensor,
    feedback: Tensor,
    codes: Tensor,
    tables: Tensor,
    groups: Tensor,
    bits: Sequence[int],
    costs: Tensor,
) -> None:
    """Codes of a block's columns in turn, each error fed back into those after it.

    Args:
        moved: float32 ``[precisions, rows, columns]``, the weights as earlier errors have moved them; changed.
        errors: the same, written: each column's error over the diagonal of ``feedback``.
        feedback: float32 ``[columns, columns]``, the block's part of U with H^-1 = U^T U.
        codes: int64 ``[rows, columns]``, written.
        tables: float32 ``[rows, groups, entries]``, all precisions end to end.
        groups: int64 ``[columns]``, of each column.
        costs: float32 ``[precisions, rows]``.
    """
    for j, group in enumerate(groups.tolist()):
        codes[:, j], values = _nearest(moved[:, :, j], costs, tables[:, group], bits)
        errors[:, :, j] = (moved[:, :, j] - values) / feedback[j, j]
        moved[:, :, j + 1 :] -= errors[:, :, j, None] * feedback[j, j + 1 :]


def descend_block(
    values: Tensor,
    pull: Tensor,
    moment: Tensor,
    codes: Tensor,
    tables: Tensor,
    groups: Tensor,
    bits: Sequence[int],
    costs: Tensor,
) -> None:
    """The best code of each column of a block in turn, everything else fixed.

    Args:
        values: float32 ``[precisions, rows, columns]``, changed to the new values.
        pull: the same, ``(w - q) H``, minus half the loss's gradient; may be changed.
        moment: float32 ``[columns, columns]``, the block's part of H.
        codes: int64 ``[rows, columns]``, changed.
        tables, groups, bits, costs: as in :func:`assign_block`.
    """
    for j, group in enumerate(groups.tolist()):
        targets = values[:, :, j] + pull[:, :, j] / moment[j, j]
        codes[:, j], chosen = _nearest(targets, costs, tables[:, group], bits)
        pull -= (chosen - values[:, :, j])[:, :, None] * moment[j]
        values[:, :, j] = chosen


def summed(values: Tensor, entries: Tensor, num_entries: int) -> Tensor:
    """float32 ``[rows, num_entries]``: the sum of each row's ``values`` at its ``entries``."""
    return torch.zeros(len(values), num_entries, device=values.device).scatter_add_(1, entries, values)
