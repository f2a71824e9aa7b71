"""Tables of a nested weight refitted to its codes under a second moment; the codes stay, whoever chose them.

It knows a weight matrix, what it was quantised to and the second moment of its inputs. ``joint`` does the same between
its searches for codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pmpd.quant.joint import damped, fast_products, fitted
from pmpd.quant.nested import NestedWeight


def refit_tables(
    weight: Tensor, nested: NestedWeight, moment: Tensor, *, steps: int, damping: float = 0.01
) -> NestedWeight:
    """``nested`` with tables of less loss ``(w - q) H (w - q)^T`` in every row and precision, from those that it has.

    The loss falls with each step of conjugate gradients; only the rounding to float16 at the end may raise it.

    Args:
        weight: ``[out, in]``, what ``nested`` was quantised from, any floating dtype; the work is done on its device.
        moment: ``[in, in]``, symmetric and not negative definite; may be rank-deficient. Its scale does not matter.
        damping: share of the moment's mean diagonal that is added to it.

    Returns:
        On the CPU, with the planes, groups and outliers of ``nested``.

    Raises:
        ValueError: shapes that differ, values that are not finite, steps below 0, damping that is not above 0.
    """
    shape = [nested.out_features, nested.in_features]
    if list(weight.shape) != shape or list(moment.shape) != [nested.in_features] * 2:
        raise ValueError(
            f"a nested weight {shape} needs its weight and a moment [in, in], got {list(weight.shape)} and "
            f"{list(moment.shape)}"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise ValueError("weight and moment must be finite")
    if steps < 0 or not damping > 0:
        raise ValueError(f"need steps >= 0 and damping > 0, got {steps} and {damping}")
    there = nested.to(weight.device)
    target, moment = weight.float(), damped(moment.to(weight.device).float(), damping)
    if there.outliers is not None:
        target = target - there.outliers.add_to(torch.zeros_like(target))
    tables = {}
    for bits, table in there.centroids.items():
        with fast_products():
            own = fitted(table.float().flatten(1), there.entries(bits).long(), target, moment, steps)
        limit = torch.finfo(table.dtype).max
        tables[bits] = own.clamp(-limit, limit).to(table.dtype).view_as(table)
    return replace(there, centroids=tables).to("cpu")
