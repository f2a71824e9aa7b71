"""Mean and variance of every block's output over a prompt, taken while the prompt is prefilled.

Knows blocks and positions; does not know who looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmpd.models import decoder_blocks


@contextmanager
def block_statistics(model: nn.Module, real: Tensor) -> Iterator[list[Tensor]]:
    """While open, each forward of a block appends float32 ``[batch, 2, hidden]``: mean and variance of its output.

    Args:
        real: bool ``[batch, length]``, False at padding, which is left out.

    Raises:
        ValueError: on leaving, a forward that did not go through the model's blocks.
    """
    _, blocks = decoder_blocks(model)  # type: ignore[arg-type]
    found: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        found.append(position_statistics(output[0] if isinstance(output, tuple) else output, real))

    handles = [block.register_forward_hook(take) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(blocks):
        raise ValueError(
            f"this way of running a {type(model).__name__} shows {len(found)} of {len(blocks)} blocks' activations: a "
            "scheduler that looks at them needs the model's own forward (device=cpu)"
        )


def position_statistics(hidden: Tensor, real: Tensor) -> Tensor:
    """Mean and variance (of the population) over the positions that are ``real``.

    Args:
        hidden: ``[batch, length, hidden]``, any float type.
        real: bool ``[batch, length]``, at least one a row.

    Returns:
        float32 ``[batch, 2, hidden]``.
    """
    weight = real.to(hidden.device, torch.float32)[..., None]
    count = weight.sum(1)
    values = hidden.float()
    mean = (values * weight).sum(1) / count
    variance = ((values - mean[:, None]).square() * weight).sum(1) / count
    return torch.stack([mean, variance], 1)
