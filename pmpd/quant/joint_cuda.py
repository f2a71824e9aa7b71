"""The column steps of joint quantisation on a GPU: ``joint_steps.cu``, launched on the current stream.

Nothing is added in an order that chance decides: the same tensors give the same codes in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources

import torch
from torch import Tensor

from pmpd.kernels import nvrtc

LANES = 32
WARPS = 4
"""Rows of a block, as in the source."""
CHUNK = 256
"""Entries that a warp of ``summed`` keeps at a time: with sums of its own for each lane they take 32 KiB."""
SHARED_FLOATS = CHUNK * LANES


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
    """As :func:`pmpd.quant.joint_torch.assign_block`."""
    _launch("assign_block", (moved, errors, feedback.contiguous()), codes, tables, groups, bits, costs)


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
    """As :func:`pmpd.quant.joint_torch.descend_block`, but ``pull`` is not changed."""
    _launch("descend_block", (values, pull, moment.contiguous()), codes, tables, groups, bits, costs)


def summed(values: Tensor, entries: Tensor, num_entries: int) -> Tensor:
    """As :func:`pmpd.quant.joint_torch.summed`."""
    rows, length = values.shape
    totals = torch.empty(rows, num_entries, device=values.device)
    chunk = min(num_entries, CHUNK)
    warps = max(1, min(WARPS, SHARED_FLOATS // (chunk * LANES)))
    with torch.cuda.device(values.device):
        _module()["summed"](
            (-(-rows // warps), -(-num_entries // chunk)),
            (warps * LANES,),
            values.contiguous(),
            entries.contiguous(),
            totals,
            rows,
            length,
            num_entries,
            chunk,
            shared_bytes=4 * warps * chunk * LANES,
        )
    return totals


def _launch(
    name: str,
    numbers: tuple[Tensor, Tensor, Tensor],
    codes: Tensor,
    tables: Tensor,
    groups: Tensor,
    bits: Sequence[int],
    costs: Tensor,
) -> None:
    _, rows, columns = numbers[0].shape
    assert all(number.is_contiguous() for number in (*numbers, tables, groups, costs))
    assert codes.stride(1) == 1
    with torch.cuda.device(codes.device):
        _module()[name](
            (-(-rows // WARPS),),
            (WARPS * LANES,),
            *numbers,
            codes,
            codes.stride(0),
            tables,
            groups,
            tables.shape[1],
            costs,
            bits[0],
            len(bits),
            rows,
            columns,
        )


@functools.cache
def _module() -> nvrtc.Module:
    return nvrtc.compile(resources.files("pmpd.quant").joinpath("joint_steps.cu").read_text())
