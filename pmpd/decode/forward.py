"""What the tokens of windows cost at chosen precisions: whole windows, or a prefix at one and the rest at another.

Knows token windows, not texts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmpd.decode.cache import with_cache
from pmpd.decode.loop import empty_cache, set_bits
from pmpd.metrics import token_nll
from pmpd.quant import PrecisionCell


@torch.no_grad()
def window_nll(
    model: nn.Module, cell: PrecisionCell | None, windows: Tensor, bits: int, *, batch_size: int = 1
) -> Tensor:
    """Negative log-likelihood of every token but a window's first at ``bits``: float64 ``[n, tokens - 1]``, nats.

    ``windows`` is int64 ``[n, tokens]``; windows are independent of each other.

    Raises:
        ValueError: windows of fewer than 2 tokens, or a precision that the model does not have.
    """
    num_windows, num_tokens = windows.shape
    if num_tokens < 2:
        raise ValueError(f"windows of {num_tokens} tokens have none to score")
    set_bits(cell, bits)
    device = next(model.parameters()).device
    parts = []
    for start in range(0, num_windows, batch_size):
        part = windows[start : start + batch_size].to(device)
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        parts.append(token_nll(logits, part[:, 1:]).cpu())
    return torch.cat(parts)


@torch.no_grad()
def two_phase_nll(
    model: nn.Module,
    cell: PrecisionCell | None,
    windows: Tensor,
    split: int,
    prefill_bits: int,
    decode_bits: int,
    *,
    batch_size: int = 1,
) -> Tensor:
    """Negative log-likelihood of what decoding would yield after a prefill: float64 ``[n, tokens - split - 1]``, nats.

    The first ``split`` tokens of each window (int64 ``[n, tokens]``) are prefilled at ``prefill_bits``, the rest is
    read over that cache at ``decode_bits`` in one forward, which equals step by step. Token ``split`` (from 0) comes
    from prefill, so it is not scored: the result is of the tokens that decode steps yield. With one precision it is
    :func:`window_nll`'s from column ``split`` on.

    Raises:
        ValueError: a split that leaves nothing to prefill or score, or a precision that the model does not have.
    """
    num_windows, num_tokens = windows.shape
    if not 1 <= split <= num_tokens - 2:
        raise ValueError(f"split={split}: 1 to {num_tokens - 2} for windows of {num_tokens} tokens")
    device = next(model.parameters()).device
    parts = []
    for start in range(0, num_windows, batch_size):
        part = windows[start : start + batch_size].to(device)
        cache = empty_cache(model, num_tokens - 1)
        set_bits(cell, prefill_bits)
        model(input_ids=part[:, :split], use_cache=True, logits_to_keep=1, **with_cache(model, cache))
        set_bits(cell, decode_bits)
        logits = model(input_ids=part[:, split:-1], use_cache=True, **with_cache(model, cache)).logits
        parts.append(token_nll(logits, part[:, split + 1 :]).cpu())
    return torch.cat(parts)
