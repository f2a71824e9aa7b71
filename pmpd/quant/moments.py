"""The second moment of each layer's inputs, each token weighted by how much the loss minds an error there.

``H = mean over tokens of s_t x_t x_t^T`` with s_t the mean squared gradient of the loss at the layer's output: for one
output row the block of the empirical Fisher information, with the gradients of all rows averaged. It knows nothing
about quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pmpd.quant.gradients import backward_over, frozen


def accumulate_moments(
    model: nn.Module, windows: Iterable[Tensor], layers: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Gradient-weighted second moments of the inputs of ``layers`` over ``windows``.

    No weight gets a gradient: only activations do, so a pass costs two forwards. Memory above the model and one
    window's activations is the result, ``in**2`` float32 a layer; for a large model call it with a part of its layers
    at a time.

    Args:
        model: returns an object with ``logits`` ``[1, tokens, vocab]`` for ``input_ids`` ``[1, tokens]``.
        windows: int64 ``[tokens]`` each, at least two tokens.
        layers: the layers to measure, by any name.

    Returns:
        By the same names, float32 ``[in, in]`` on each weight's own device, scaled to a mean diagonal of one (zeros
        where no input or no gradient ever was).

    Raises:
        ValueError: no windows, one that is too short, float16 weights (their gradients underflow: use float32 or
            bfloat16), or a moment that is not finite.
    """
    for name, layer in layers.items():
        if layer.weight.dtype == torch.float16:
            raise ValueError(f"{name} is float16, whose gradients underflow; load the model in float32 or bfloat16")
    sums = {name: torch.zeros(2 * [layer.in_features], device=layer.weight.device) for name, layer in layers.items()}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    handles += [layer.register_forward_hook(_watch(sums[name])) for name, layer in layers.items()]
    try:
        with frozen(model):
            backward_over(model, windows)
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        scale = total.diagonal().mean()
        if not torch.isfinite(total).all():
            raise ValueError(f"the moment of {name} is not finite in {type(model).__name__}; use float32")
        if scale > 0:
            total /= scale
    return sums


def _watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that, when the gradient of the layer's output comes, adds the weighted second moment."""

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach().flatten(0, -2)

        def backward(gradient: Tensor) -> None:
            # The squares of small gradients underflow; the scale of the sum does not matter.
            weight = gradient.flatten(0, -2).float().norm(dim=1)
            scaled = inputs.float() * weight[:, None] * 2.0**16
            total.addmm_(scaled.T, scaled)

        output.register_hook(backward)

    return forward
