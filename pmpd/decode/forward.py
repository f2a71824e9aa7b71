"""Perplexity sums at chosen precisions: whole windows, or a prefix at one precision and the rest at another.

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
) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of tokens scored, at ``bits``.

    ``windows`` is int64 ``[n, tokens]``; every token but a window's first is scored, in windows independent of
    each other.

    Raises:
        ValueError: windows of fewer than 2 tokens, or a precision that the model does not have.
    """
    num_windows, num_tokens = windows.shape
    if num_tokens < 2:
        raise ValueError(f"windows of {num_tokens} tokens have none to score")
    set_bits(cell, bits)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, num_windows, batch_size):
        part = windows[start : start + batch_size].to(device)
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        total += token_nll(logits, part[:, 1:])
    return total, num_windows * (num_tokens - 1)


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
) -> tuple[float, int]:
    """Summed negative log-likelihood of what decoding would yield after a prefill, and the number of tokens scored.

    The first ``split`` tokens of each window (int64 ``[n, tokens]``) are prefilled at ``prefill_bits``, the rest is
    read over that cache at ``decode_bits`` in one forward, which equals step by step. Token ``split`` (from 0) comes
    from prefill, so it is not scored: the sum is over the ``tokens - split - 1`` that decode steps yield.

    Raises:
        ValueError: a split that leaves nothing to prefill or score, or a precision that the model does not have.
    """
    num_windows, num_tokens = windows.shape
    if not 1 <= split <= num_tokens - 2:
        raise ValueError(f"split={split}: 1 to {num_tokens - 2} for windows of {num_tokens} tokens")
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, num_windows, batch_size):
        part = windows[start : start + batch_size].to(device)
        cache = empty_cache(model, num_tokens - 1)
        set_bits(cell, prefill_bits)
        model(input_ids=part[:, :split], use_cache=True, logits_to_keep=1, **with_cache(model, cache))
        set_bits(cell, decode_bits)
        logits = model(input_ids=part[:, split:-1], use_cache=True, **with_cache(model, cache)).logits
        total += token_nll(logits, part[:, split + 1 :])
    return total, num_windows * (num_tokens - split - 1)
