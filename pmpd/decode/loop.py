"""The decode loop: prefill a batch, then one forward a token, greedily, at the precision that a policy says.

The only loop there is: evaluation, rollouts, streaming and timing consume :func:`decode`. Knows neither
text nor which schedules are worth comparing, nor how a forward is computed: a model is called as ``transformers``
models are, and one that is a :class:`StepModel` (graphs on a GPU) takes decode steps by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pmpd.decode.activations import block_statistics
from pmpd.decode.cache import BufferCache, with_cache
from pmpd.quant import PrecisionCell
from pmpd.records import FP16_BITS, Prefill, Step
from pmpd.schedulers import Policy


@dataclass
class State:
    """A batch between two forwards. Only rows that have not ended are in it.

    Attributes:
        cache: KV of all blocks; a column is a position of the left-padded batch.
        mask: bool ``[batch, capacity]``, False where a row is padded; None if no row is.
        prompt_tokens: int64 ``[batch]``.
        rows: int64 ``[batch]``, which prompt of the original batch each row is.
        tokens: int64 ``[batch]``, the last token of each row; of no meaning while ``step`` is 0.
        logits: ``[batch, vocab]`` of the last forward; the next one may write over them.
        step: index of the next step to yield; 0 when only prefill was run.
        bits: precision of the last forward.
        max_new_tokens: how many generated tokens a row the cache has room for.
        activations: float32 ``[batch, layers, 2, hidden]`` of prefill, see :class:`pmpd.records.Prefill`; None unless
            asked for.
    """

    cache: BufferCache
    mask: Tensor | None
    prompt_tokens: Tensor
    rows: Tensor
    tokens: Tensor
    logits: Tensor
    step: int
    bits: int
    max_new_tokens: int
    activations: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fork(self, index: Tensor | None = None) -> State:
        """An independent state of the rows at ``index`` (int64, places in this state; all if None)."""
        if index is None:
            return replace(self, cache=self.cache.fork(), logits=self.logits.clone())
        return replace(self, cache=self.cache.fork(index), **self._small(index))

    def keep(self, index: Tensor) -> None:
        """Drop every row but those at ``index``, in place and without allocating. Rows may change places."""
        index = index.sort().values
        count = len(index)
        order = torch.arange(count, device=index.device)
        taken = torch.zeros(len(self), dtype=torch.bool, device=index.device)
        taken[index] = True
        order[~taken[:count]] = index[index >= count]  # holes are filled from the end: fewest rows move
        self.cache.keep(order)
        for name, value in self._small(order).items():
            setattr(self, name, value)

    def _small(self, index: Tensor) -> dict[str, Any]:
        return {
            "mask": None if self.mask is None else self.mask[index],
            "prompt_tokens": self.prompt_tokens[index],
            "rows": self.rows[index],
            "tokens": self.tokens[index],
            "logits": self.logits[index],
            "activations": None if self.activations is None else self.activations[index],
        }

    def view(self, row: int) -> Prefill:
        """What a scheduler may look at: the last block's keys and values of row ``row``, without padding (copies).

        Raises:
            ValueError: decoding has begun, so the cache holds more than the prompt.
        """
        if self.step != 0:
            raise ValueError(f"a scheduler looks at prefill, but {self.step} tokens have been generated")
        keys, values = self.cache.buffers[-1].used()
        start = self.cache.length - int(self.prompt_tokens[row])
        return Prefill(
            keys[row, :, start:].clone(),
            values[row, :, start:].clone(),
            self.logits[row],
            self.max_new_tokens,
            None if self.activations is None else self.activations[row],
        )


class ContextError(ValueError):
    """A prompt that does not fit the model's context together with the answer."""


@runtime_checkable
class StepModel(Protocol):
    """A model that has a faster way to take one decode step than its forward, for up to ``max_rows`` sequences."""

    max_rows: int

    def decode_step(self, state: State) -> tuple[Tensor, Tensor]:
        """Read ``state.tokens`` at ``state.bits``, append their KV to ``state.cache``.

        Returns:
            ``[rows, vocab]`` logits, which the state's next step may write over, and int64 ``[rows]``, the first of the
            largest in each row.
        """


def context_limit(model: nn.Module) -> int | None:
    """Positions that the model was made for, or None if its configuration names no limit."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def empty_cache(model: nn.Module, capacity: int) -> BufferCache:
    """A cache for ``model`` with room for ``capacity`` positions a row."""
    config: Any = model.config
    return BufferCache.empty(config.get_text_config().num_hidden_layers, capacity)


def prefill(
    model: nn.Module,
    cell: PrecisionCell | None,
    prompts: Sequence[Sequence[int]],
    bits: int,
    *,
    max_new_tokens: int,
    pad_id: int = 0,
    activations: bool = False,
) -> State:
    """Run the prompts through the model in one forward, padded on the left.

    Args:
        cell: the precision that the model's layers share; None for an unquantised model.
        bits: precision of prefill.
        max_new_tokens: room to leave for generated tokens, at least 1.
        pad_id: any id of the vocabulary; padding is masked.
        activations: take the statistics of every block's output too.

    Raises:
        ContextError: a prompt that does not fit the model's context together with ``max_new_tokens``.
        ValueError: no prompts, an empty one, a precision that the model does not have, or activations of a model that
            does not show them.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    if not prompts:
        raise ValueError("prompts is empty")
    limit = context_limit(model)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise ContextError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                f"that is more than the model's context of {limit}"
            )
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    prompt_tokens = torch.tensor(lengths)
    positions = torch.arange(width) - (width - prompt_tokens)[:, None]
    capacity = width + max_new_tokens - 1  # the last token is never read
    mask = None
    if min(lengths) < width:
        mask = torch.ones(len(prompts), capacity, dtype=torch.bool)
        mask[:, :width] = positions >= 0
    device = next(model.parameters()).device
    cache = empty_cache(model, capacity)
    mask = None if mask is None else mask.to(device)
    with ExitStack() as stack:
        found = stack.enter_context(block_statistics(model, positions >= 0)) if activations else []
        logits = _forward(model, cell, bits, padded.to(device), positions.clamp(min=0).to(device), mask, cache)
    rows = torch.arange(len(prompts), device=device)
    tokens = torch.zeros_like(rows)
    statistics = torch.stack(found, 1) if activations else None
    return State(cache, mask, prompt_tokens.to(device), rows, tokens, logits, 0, bits, max_new_tokens, statistics)


def decode(
    model: nn.Module,
    cell: PrecisionCell | None,
    state: State,
    policy: Policy,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
) -> Iterator[Step]:
    """Generate greedily from ``state``, which is advanced in place, and yield every forward's tokens.

    Starts with token 1 (step 0, from the logits of prefill) or goes on where ``state`` is. Rows leave the
    batch with their end-of-sequence token; the iterator ends when none is left or every row has
    ``max_new_tokens`` tokens, counted from prefill. At each yield ``state`` is whole: a consumer may stop there, fork
    it or go on from it with another policy. Without ``eos_ids`` nothing on a GPU waits for a step, unless the policy
    looks at logits; :func:`pmpd.decode.ahead.ahead` ends such an iterator at the end-of-sequence token.

    Raises:
        ValueError: more tokens than the cache has room for, or a precision that the model does not have.
    """
    if max_new_tokens > state.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, but prefill left room for max_new_tokens={state.max_new_tokens}"
        )
    eos = torch.tensor(sorted(eos_ids), device=state.rows.device) if eos_ids else None
    while state.step < max_new_tokens and len(state):
        if state.step:
            state.bits = policy.bits(state.step, state.logits)
            state.logits, state.tokens = _step(model, cell, state)
        else:
            state.tokens = state.logits.argmax(-1)
        step = Step(state.step, state.tokens, state.bits, state.rows)
        state.step += 1
        if eos is not None:
            going = torch.isin(state.tokens, eos, invert=True)
            if not going.all():
                state.keep(going.nonzero()[:, 0])
        yield step


def _step(model: nn.Module, cell: PrecisionCell | None, state: State) -> tuple[Tensor, Tensor]:
    """Logits and tokens of decode step ``state.step`` at ``state.bits``."""
    if isinstance(model, StepModel) and len(state) <= model.max_rows:
        set_bits(cell, state.bits)
        return model.decode_step(state)
    positions = state.prompt_tokens + (state.step - 1)
    logits = _forward(model, cell, state.bits, state.tokens[:, None], positions[:, None], state.mask, state.cache)
    return logits, logits.argmax(-1)


@torch.no_grad()  # not inference_mode: its tensors could not be trained on, and weights dequantised in it either
def _forward(
    model: nn.Module,
    cell: PrecisionCell | None,
    bits: int,
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: BufferCache,
) -> Tensor:
    """Logits ``[batch, vocab]`` after ``tokens`` ``[batch, n]``, whose KV is appended to ``cache``."""
    set_bits(cell, bits)
    output = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=None if mask is None else mask[:, : cache.length + tokens.shape[1]],
        use_cache=True,
        logits_to_keep=1,
        **with_cache(model, cache),
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def set_bits(cell: PrecisionCell | None, bits: int) -> None:
    """Let the model run at ``bits``.

    Raises:
        ValueError: a precision that the model does not have; without a cell it has 16 only.
    """
    if cell is not None:
        if cell.bits != bits:
            cell.bits = bits
    elif bits != FP16_BITS:
        raise ValueError(f"bits={bits}, but the model is not quantised: it has {FP16_BITS} bits only")
