"""Backward passes over calibration text: what every statistic that weights a quantiser's errors starts from.

Knows the language-model loss, and neither layers nor what is done with their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it gradients are computed and no parameter asks for one; mode and flags are put back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)


def backward_over(model: nn.Module, windows: Iterable[Tensor]) -> int:
    """A backward pass of each window's mean next-token cross-entropy; returns how many there were.

    Args:
        model: returns an object with ``logits`` ``[1, tokens, vocab]`` for ``input_ids`` ``[1, tokens]``.
        windows: int64 ``[tokens]`` each, at least two tokens.

    Raises:
        ValueError: no windows, or one that is too short.
    """
    num_windows = 0
    for window in windows:
        if window.dim() != 1 or len(window) < 2:
            raise ValueError(f"a window must be [tokens] with at least 2 tokens, got {list(window.shape)}")
        ids = window.to(next(model.parameters()).device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits.float(), ids[1:]).backward()
        num_windows += 1
    if num_windows == 0:
        raise ValueError("windows is empty: at least one calibration window is needed")
    return num_windows
