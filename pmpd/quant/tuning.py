"""Tuning of one precision's tables so that the whole model answers as at 16 bits; codes and other precisions stay.

The loss is the Kullback-Leibler divergence of the next-token distributions, 16 bits first. It needs a model whose
layers are ``NestedLinear``, with their originals, and knows not how the codes were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from pmpd.quant.gradients import frozen
from pmpd.quant.joint import entry_sums, fast_products
from pmpd.quant.linear import NestedLinear, PrecisionCell
from pmpd.quant.sparse import Outliers
from pmpd.records import FP16_BITS

BETAS = (0.9, 0.95)
"""Adam's: a short memory of squares, since there are only tens to hundreds of steps."""


def tune_tables(
    model: nn.Module,
    cell: PrecisionCell,
    windows: Tensor,
    bits: int,
    *,
    steps: int,
    rate: float,
    batch_size: int = 4,
    progress: bool = False,
) -> list[float]:
    """Tune the tables of ``bits`` in every layer of ``cell``, in place, by Adam over batches of ``windows`` in turn.

    The rate falls to zero linearly. A forward keeps no weight matrix for its backward, which looks it up again: memory
    above the model and activations is a byte a weight for the codes and three float32 tables.

    Args:
        model: returns an object with ``logits`` ``[n, tokens, vocab]`` for ``input_ids`` ``[n, tokens]``.
        windows: int64 ``[n, tokens]``.
        rate: of a step, in standard deviations of a row's table.

    Returns:
        The divergence in nats a token, of each step's batch before the step.

    Raises:
        ValueError: no windows, steps below 0, or a divergence that is not finite (lower ``rate``).
    """
    if windows.dim() != 2 or not len(windows) or steps < 0:
        raise ValueError(f"need windows [n >= 1, tokens] and steps >= 0, got {list(windows.shape)} and {steps}")
    seen: list[float] = []
    device = next(model.parameters()).device
    with frozen(model), fast_products(), _tunable(cell, bits) as deltas:
        optimiser = torch.optim.Adam(deltas, lr=rate, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / max(steps, 1))
        for step in tqdm(range(steps), desc=f"tune {bits} bits", unit="step", disable=None if progress else True):
            rows = [k % len(windows) for k in range(step * batch_size, (step + 1) * batch_size)]
            batch = windows[rows].to(device)
            cell.bits = FP16_BITS
            with torch.no_grad():
                wanted = _log_probabilities(model, batch)
            cell.bits = bits
            own = _log_probabilities(model, batch)
            loss = functional.kl_div(own, wanted, log_target=True, reduction="sum") / batch.numel()
            if not torch.isfinite(loss):
                raise ValueError(f"the divergence at {bits} bits is not finite at step {step}: lower rate={rate}")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            seen.append(float(loss.detach()))
    return seen


def _log_probabilities(model: Any, batch: Tensor) -> Tensor:
    return functional.log_softmax(model(input_ids=batch, use_cache=False).logits.float().flatten(0, 1), dim=-1)


@contextmanager
def _tunable(cell: PrecisionCell, bits: int) -> Iterator[list[Tensor]]:
    """Within it layers at ``bits`` follow the parameters yielded, changes of tables in deviations of their row; then
    the tables are what these made of them."""
    tuned = [_Tuned(layer, bits) for layer in cell.layers]
    for own in tuned:
        own.layer.forward = own.forward  # type: ignore[method-assign]
    try:
        yield [own.delta for own in tuned]
    finally:
        for own in tuned:
            del own.layer.forward
            own.put_back()


class _Tuned:
    """A layer whose table at ``bits`` is ``start + scale * delta``."""

    def __init__(self, layer: NestedLinear, bits: int) -> None:
        assert layer.nested is not None
        device = layer.anchor.device
        self.layer, self.bits = layer, bits
        self.entries = layer.nested.entries(bits).to(device)
        self.outliers = None if layer.nested.outliers is None else layer.nested.outliers.to(device)
        self.start = layer.nested.centroids[bits].to(device).float().flatten(1)
        self.scale = self.start.std(1, keepdim=True)
        self.delta = torch.zeros_like(self.start, requires_grad=True)

    def table(self) -> Tensor:
        return self.start + self.scale * self.delta

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.cell.bits != self.bits:
            return NestedLinear.forward(layer, x)
        assert layer.nested is not None
        product = _Product.apply(x, self.table(), self.entries, self.outliers)  # type: ignore[no-untyped-call]
        return product if layer.bias is None else product + layer.bias

    def put_back(self) -> None:
        assert self.layer.nested is not None
        old = self.layer.nested.centroids[self.bits]
        limit = torch.finfo(old.dtype).max
        self.layer.nested.centroids[self.bits] = (
            self.table().detach().clamp(-limit, limit).to(old.dtype).view_as(old).to(old.device)
        )
        self.layer.drop(self.bits)


class _Product(torch.autograd.Function):
    """``x @ (table[entries] + outliers).T``, which keeps neither the matrix nor its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, entries: Tensor, outliers: Outliers | None) -> Tensor:
        ctx.save_for_backward(x, table, entries)
        ctx.outliers = outliers
        return functional.linear(x, _matrix(table, entries, outliers).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, entries = ctx.saved_tensors
        gradient, to_x = gradients[0], None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ _matrix(table, entries, ctx.outliers).to(gradient.dtype)
        to_matrix = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return to_x, entry_sums(to_matrix, entries.long(), table.shape[1]), None, None


def _matrix(table: Tensor, entries: Tensor, outliers: Outliers | None) -> Tensor:
    dense = table.gather(1, entries.long())
    return dense if outliers is None else outliers.add_to(dense)
