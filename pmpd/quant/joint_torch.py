"""The column steps of joint quantisation in plain PyTorch, all rows at once: the definition of what ``joint_cpu`` and
``joint_cuda`` compute. A stage's precisions are consecutive, and their tables lie end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _nearest(
    targets: Tensor,
    costs: Tensor,
    table: Tensor,
    bits: Sequence[int],
    prefix: Tensor,
    below: int,
) -> tuple[Tensor, Tensor]:
    """The code ``[rows]`` of ``bits[-1]`` bits below ``prefix`` (of ``below`` bits) of least summed cost, the first of
    equals, and its values ``[precisions, rows]``.

    ``costs[s] * (targets[s] - value)**2`` is what a value costs at the stage's precision s.
    """
    entries, total = [], None
    for s, b in enumerate(bits):
        children = torch.arange(1 << (b - below), device=table.device)
        entries.append(table.gather(1, (1 << b) - (1 << bits[0]) + (prefix[:, None] << (b - below)) + children))
        cost = (targets[s][:, None] - entries[s]).square_() * costs[s][:, None]
        total = cost if total is None else cost + total.repeat_interleave(1 << (b - bits[s - 1]), dim=1)
    assert total is not None
    leaf = total.argmin(1)
    values = [e.gather(1, (leaf >> (bits[-1] - b))[:, None])[:, 0] for e, b in zip(entries, bits, strict=True)]
    return (prefix << (bits[-1] - below)) + leaf, torch.stack(values)


def assign_block(
    moved: Tensor,
    errors: Tensor,
    feedback: Tensor,
    codes: Tensor,
    prefix: Tensor,
    below: int,
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
        prefix: int64 ``[rows, columns]``, what earlier stages chose, of ``below`` bits.
        tables: float32 ``[rows, groups, entries]``, all precisions of the stage end to end.
        groups: int64 ``[columns]``, of each column.
        costs: float32 ``[precisions, rows]``.
    """
    for j, group in enumerate(groups.tolist()):
        codes[:, j], values = _nearest(moved[:, :, j], costs, tables[:, group], bits, prefix[:, j], below)
        errors[:, :, j] = (moved[:, :, j] - values) / feedback[j, j]
        moved[:, :, j + 1 :] -= errors[:, :, j, None] * feedback[j, j + 1 :]


def descend_block(
    values: Tensor,
    pull: Tensor,
    moment: Tensor,
    codes: Tensor,
    prefix: Tensor,
    below: int,
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
        prefix, below, tables, groups, bits, costs: as in :func:`assign_block`.
    """
    for j, group in enumerate(groups.tolist()):
        targets = values[:, :, j] + pull[:, :, j] / moment[j, j]
        codes[:, j], chosen = _nearest(targets, costs, tables[:, group], bits, prefix[:, j], below)
        pull -= (chosen - values[:, :, j])[:, :, None] * moment[j]
        values[:, :, j] = chosen


def summed(values: Tensor, entries: Tensor, num_entries: int) -> Tensor:
    """float32 ``[rows, num_entries]``: the sum of each row's ``values`` at its ``entries``."""
    return torch.zeros(len(values), num_entries, device=values.device).scatter_add_(1, entries, values)
