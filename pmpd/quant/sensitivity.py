"""How much the language-model loss minds an error in each weight: the diagonal of the empirical Fisher information.

It knows nothing about quantisation; the mean of squared gradients is what SqueezeLLM (Kim et al., 2024) and
Any-Precision LLM (Park et al., 2024) weight their k-means with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm


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
    num_windows = 0
    with _gradients_of(model, layers, sums):
        for window in tqdm(windows, desc="sensitivity", unit="window", disable=not progress):
            if window.dim() != 1 or len(window) < 2:
                raise ValueError(f"a window must be [tokens] with at least 2 tokens, got {list(window.shape)}")
            ids = window.to(next(model.parameters()).device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits.float(), ids[1:]).backward()
            num_windows += 1
    if num_windows == 0:
        raise ValueError("windows is empty: sensitivity needs at least one calibration window")
    for name, total in sums.items():
        total /= num_windows
        if not torch.isfinite(total).all():
            raise ValueError(f"the gradient of {name} is not finite in {model.__class__.__name__}; use float32")
    return sums


@contextmanager
def _gradients_of(model: nn.Module, layers: Mapping[str, nn.Linear], sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, a backward pass adds the squared gradients of ``layers`` to ``sums`` and leaves none behind."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training

    def square_into(total: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            total.addcmul_(gradient, gradient)
            parameter.grad = None

        return hook

    model.eval()
    for parameter in flags:
        parameter.requires_grad_(False)
    hooks = []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        hooks.append(layer.weight.register_post_accumulate_grad_hook(square_into(sums[name])))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)
