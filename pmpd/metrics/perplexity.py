"""Perplexity from logits: negative log-likelihoods summed in float64. Knows no model and no text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_POSITIONS = 256
"""Positions turned to float32 at once: 256 rows of a 128k vocabulary are 134 MB, whole windows would be gigabytes."""


def token_nll(logits: Tensor, targets: Tensor) -> float:
    """Sum of ``-log p(target)`` in nats over all positions.

    ``logits`` is ``[..., vocab]`` of any float type, ``targets`` int64 ``[...]`` already shifted, so that
    ``logits[i]`` predicts ``targets[i]``. Each log-softmax is float32, the sum float64; it is one
    synchronisation on a GPU. Logits that are not finite give NaN or infinity, not an exception: a
    precision that breaks the model is a result.

    Raises:
        ValueError: shapes that do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}")
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(flat), CHUNK_POSITIONS):
        part = slice(start, start + CHUNK_POSITIONS)
        total += functional.cross_entropy(rows[part].float(), flat[part], reduction="none").double().sum()
    return float(total)


def perplexity(nll_sum: float, num_tokens: int) -> float:
    """``exp(nll_sum / num_tokens)``; infinity when that overflows.

    Raises:
        ValueError: ``num_tokens`` below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: perplexity needs at least one scored token")
    try:
        return math.exp(nll_sum / num_tokens)
    except OverflowError:
        return math.inf
