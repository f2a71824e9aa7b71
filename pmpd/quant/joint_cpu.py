"""The column steps of joint quantisation on a CPU: compiled, rows in parallel. ``joint`` defines what they compute.

A column's code is found by branch and bound over the tree of prefixes: the greedy path's cost bounds the rest, so of
the 2^8 leaves few are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


def assign_block(moved: Tensor, errors: Tensor, feedback: Tensor, *columns: Any) -> None:
    """As :func:`pmpd.quant.joint_torch.assign_block`."""
    _assign(moved.numpy(), errors.numpy(), feedback.contiguous().numpy(), *_arrays(*columns))


def descend_block(values: Tensor, pull: Tensor, moment: Tensor, *columns: Any) -> None:
    """As :func:`pmpd.quant.joint_torch.descend_block`."""
    _descend(values.numpy(), pull.numpy(), moment.contiguous().numpy(), *_arrays(*columns))


def summed(values: Tensor, entries: Tensor, num_entries: int) -> Tensor:
    """As :func:`pmpd.quant.joint_torch.summed`."""
    return torch.from_numpy(_summed(values.numpy(), entries.numpy(), num_entries))


def _arrays(codes: Tensor, tables: Tensor, groups: Tensor, bits: Sequence[int], costs: Tensor) -> tuple[Any, ...]:
    offsets = np.array([(1 << b) - (1 << bits[0]) for b in bits])
    whole = (groups.numpy(), offsets, np.array(bits))
    return codes.numpy(), tables.numpy(), *whole, costs.numpy()


@njit(cache=True)
def _nearest(targets, costs, table, offsets, bits, live, live_cost):  # type: ignore[no-untyped-def]
    """The code of ``bits[-1]`` bits of least cost; the first of equals."""
    num = len(bits)
    # Greedy: at each precision the nearest entry below the path so far.
    bound = 0.0
    code = 0
    below = 0
    for s in range(num):
        first = code << (bits[s] - below)
        best = np.inf
        for k in range(first, first + (1 << (bits[s] - below))):
            d = targets[s] - table[offsets[s] + k]
            if d * d * costs[s] < best:
                best = d * d * costs[s]
                code = k
        bound += best
        below = bits[s]
    best_code = code
    # Everything else that costs less.
    live[0, 0] = 0
    live_cost[0, 0] = 0.0
    count = 1
    below = 0
    for s in range(num):
        now, then = s % 2, (s + 1) % 2
        width = 1 << (bits[s] - below)
        kept = 0
        for i in range(count):
            first = live[now, i] * width
            for k in range(first, first + width):
                d = targets[s] - table[offsets[s] + k]
                cost = live_cost[now, i] + d * d * costs[s]
                if cost < bound:
                    if s == num - 1:
                        bound = cost
                        best_code = k
                    else:
                        live[then, kept] = k
                        live_cost[then, kept] = cost
                        kept += 1
        count = kept
        below = bits[s]
        if count == 0:
            break
    return best_code


@njit(parallel=True, cache=True)
def _assign(moved, errors, feedback, codes, tables, groups, offsets, bits, costs):  # type: ignore[no-untyped-def]
    num, num_rows, num_columns = moved.shape
    most = 1 << bits[-1]
    for r in prange(num_rows):
        live = np.empty((2, most), np.int64)
        live_cost = np.empty((2, most), np.float32)
        targets = np.empty(num, np.float32)
        own_costs = costs[:, r].copy()
        for j in range(num_columns):
            for s in range(num):
                targets[s] = moved[s, r, j]
            table = tables[r, groups[j]]
            code = _nearest(targets, own_costs, table, offsets, bits, live, live_cost)
            codes[r, j] = code
            for s in range(num):
                error = (targets[s] - table[offsets[s] + (code >> (bits[-1] - bits[s]))]) / feedback[j, j]
                errors[s, r, j] = error
                for k in range(j + 1, num_columns):
                    moved[s, r, k] -= error * feedback[j, k]


@njit(parallel=True, cache=True)
def _descend(values, pull, moment, codes, tables, groups, offsets, bits, costs):  # type: ignore[no-untyped-def]
    num, num_rows, num_columns = values.shape
    most = 1 << bits[-1]
    for r in prange(num_rows):
        live = np.empty((2, most), np.int64)
        live_cost = np.empty((2, most), np.float32)
        targets = np.empty(num, np.float32)
        own_costs = costs[:, r].copy()
        for j in range(num_columns):
            for s in range(num):
                targets[s] = values[s, r, j] + pull[s, r, j] / moment[j, j]
            table = tables[r, groups[j]]
            code = _nearest(targets, own_costs, table, offsets, bits, live, live_cost)
            if code != codes[r, j]:
                codes[r, j] = code
                for s in range(num):
                    value = table[offsets[s] + (code >> (bits[-1] - bits[s]))]
                    change = value - values[s, r, j]
                    values[s, r, j] = value
                    for k in range(num_columns):
                        pull[s, r, k] -= change * moment[j, k]


@njit(parallel=True, cache=True)
def _summed(values, entries, num_entries):  # type: ignore[no-untyped-def]
    num_rows, n = values.shape
    total = np.zeros((num_rows, num_entries), np.float32)
    for r in prange(num_rows):
        for i in range(n):
            total[r, entries[r, i]] += values[r, i]
    return total
