"""How much the language-model loss minds an error in each weight: the diagonal of the empirical Fisher information.

It knows nothing about quantisation; the mean of squared gradients is what SqueezeLLM (Kim et al., 2024) and
Any-Precision LLM (Park et al., 2024) weight their k-means with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pmpd.quant.gradients import backward_over, frozen


def accumulate(
    model: nn.Module, windows: Iterable[Tensor], layers: Mapping[str, nn.Linear], *, progress: bool = False
) -> dict[str, Tensor]:
    """Mean over ``windows`` of the squared gradient of the loss with respect to each layer's weight.

    The loss of a window is the mean cross-entropy of its next tokens. Only ``layers`` get gradients, and each is
    squared, added and freed as soon as the backward pass has it, so memory above the model and one window's
    activations is one float32 copy of those weights and one layer's gradient.
    The model's mode and ``requires_grad`` flags are put back.

    Args:
        model: returns an object with ``logits`` ``[1, tokens, vocab]`` for ``input_ids`` ``[1, tokens]``.
        windows: int64 ``[tokens]`` each, at least two tokens.
        layers: the layers to measure, by any name.
        progress: show a progress bar.

    Returns:
        By the same names, float32 ``[out, in]`` on each weight's own device.

    Raises:
        ValueError: no windows, a window that is too short, float16 weights (their gradients underflow: use float32
            or bfloat16), or a gradient that is not finite.
    """
    for name, layer in layers.items():
        if layer.weight.dtype == torch.float16:
            raise ValueError(f"{name} is float16, whose gradients underflow; load the model in float32 or bfloat16")
    sums = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    with frozen(model), _squares_of(layers, sums):
        num_windows = backward_over(model, tqdm(windows, desc="sensitivity", unit="window", disable=not progress))
    for name, total in sums.items():
        total /= num_windows
        if not torch.isfinite(total).all():
            raise ValueError(f"the gradient of {name} is not finite in {model.__class__.__name__}; use float32")
    return sums


@contextmanager
def _squares_of(layers: Mapping[str, nn.Linear], sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, a backward pass adds the squared gradients of ``layers`` to ``sums`` and leaves none behind."""

    def square_into(total: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            total.addcmul_(gradient, gradient)
            parameter.grad = None

        return hook

    handles = []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        handles.append(layer.weight.register_post_accumulate_grad_hook(square_into(sums[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
