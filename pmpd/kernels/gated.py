"""Products of gate and up as one: their rows in turns, so that a tile has the gates and ups of the same outputs.

Plain tensor operations on any device; it knows neither layers nor kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TURN = 8
"""Rows of gate, then as many of up: half a tile each."""


def in_turns(gate: Tensor, up: Tensor, dim: int = 0) -> Tensor:
    """Eight rows of ``gate``, eight of ``up``, and so on along ``dim``, whose size must be a multiple of 8."""
    pair = torch.stack([part.unflatten(dim, (-1, TURN)) for part in (gate, up)], dim=dim + 1)
    return pair.flatten(dim, dim + 2)


def gated(product: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, Shazeer, 2020) of ``[..., 2 * n]``, both in turns: ``[..., n]``."""
    gate, up = product.unflatten(-1, (-1, 2, TURN)).unbind(-2)
    return (functional.silu(gate) * up).flatten(-2)
