"""Perplexity from logits: negative log-likelihoods a token, averaged in float64. Knows no model and no text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_POSITIONS = 256
"""Positions turned to float32 at once: 256 rows of a 128k vocabulary are 134 MB, whole windows would be gigabytes."""


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` in nats, float64 of the shape of ``targets`` and on their device.

    ``logits`` is ``[..., vocab]`` of any float type, ``targets`` int64 ``[...]`` already shifted, so that
    ``logits[i]`` predicts ``targets[i]``. Each log-softmax is float32. Logits that are not finite give NaN or
    infinity, not an exception: a precision that breaks the model is a result.

    Raises:
        ValueError: shapes that do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}")
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    nll = torch.empty(len(flat), dtype=torch.float64, device=logits.device)
    for start in range(0, len(flat), CHUNK_POSITIONS):
        part = slice(start, start + CHUNK_POSITIONS)
        nll[part] = functional.cross_entropy(rows[part].float(), flat[part], reduction="none")
    return nll.view(targets.shape)


def perplexity(nll: Tensor) -> float:
    """``exp`` of the mean of ``nll`` (nats, any shape); infinity when that overflows.

    Raises:
        ValueError: no values.
    """
    if nll.numel() == 0:
        raise ValueError("perplexity needs at least one scored token")
    try:
        return math.exp(float(nll.double().mean()))
    except OverflowError:
        return math.inf
