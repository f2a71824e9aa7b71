"""One decode step of any ``transformers`` model on buffers that never move, so that a graph can be captured of it.

The model's own code runs as it is, over a cache whose column is a tensor and a mask that hides the columns not yet
written. Works on a CPU too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pmpd.decode.cache import BufferCache, with_cache
from pmpd.decode.graphs import MAX_ROWS
from pmpd.decode.llama import rope_types
from pmpd.decode.loop import State

CAPACITY_STEP = 256
"""Columns are allocated in such steps; what is allocated is attended to, masked, at every step."""


class CapturedStep:
    """As :class:`pmpd.decode.graphs.StepBody`.

    The buffers are lent to one cache at a time: a cache that comes is moved in, one that is still used moves out.
    """

    def __init__(self, model: Any) -> None:
        """Raises:
        ValueError: a model that :func:`not_capturable` names a reason against.
        """
        if reason := not_capturable(model.config):
            raise ValueError(reason)
        self.model = model
        config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.tokens = torch.zeros(MAX_ROWS, dtype=torch.int64, device=self.device)
        self.counters = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.starts = torch.zeros(MAX_ROWS, dtype=torch.int64, device=self.device)
        head = model.get_output_embeddings().weight
        self.logits = torch.zeros(MAX_ROWS, head.shape[0], dtype=head.dtype, device=self.device)
        self.layers = [_ColumnLayer(self.counters) for _ in range(config.num_hidden_layers)]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = 0
        self.columns = torch.empty(0, dtype=torch.int64, device=self.device)
        self._tenant: weakref.ref[BufferCache] | None = None

    def bind(self, state: State) -> bool:
        cache = state.cache
        needed = -(-cache.buffers[0].capacity // CAPACITY_STEP) * CAPACITY_STEP
        tenant = self._tenant() if self._tenant is not None else None
        grows = needed > len(self.columns) or len(state) > self.rows
        if tenant is not None and (tenant is not cache or grows):
            tenant.move(*(_like(tenant, rows=tenant.buffers[0].rows, capacity=tenant.buffers[0].capacity)))
        if grows:
            self.rows, capacity = max(self.rows, len(state)), max(len(self.columns), needed)
            self.keys, self.values = _like(cache, rows=self.rows, capacity=capacity)
            for layer, *own in zip(self.layers, self.keys, self.values, strict=True):
                layer.keys, layer.values = own
            self.columns = torch.arange(capacity, device=self.device)
        if tenant is not cache or grows:
            cache.move(self.keys, self.values)
            self._tenant = weakref.ref(cache)
        self.counters.fill_(cache.length)
        self.starts[: len(state)] = cache.length - (state.prompt_tokens + (state.step - 1))
        return grows

    def run(self, bits: int, rows: int) -> None:
        """One step at the precision that the model's cell has; ``bits`` is that precision."""
        for layer in self.layers:
            layer.rows = rows
        starts = self.starts[:rows, None]
        seen = (self.columns <= self.counters) & (self.columns >= starts)
        output = self.model(
            input_ids=self.tokens[:rows, None],
            position_ids=self.counters - starts,
            attention_mask=seen[:, None, None],
            use_cache=True,
            logits_to_keep=1,
            **with_cache(self.model, Cache(layers=[*self.layers])),
        )
        self.logits[:rows] = output.logits[:, -1]
        self.tokens[:rows] = output.logits[:, -1].argmax(-1)
        self.counters += 1

    def result(self, column: int, rows: int) -> tuple[Tensor, Tensor]:
        return self.logits[:rows].clone(), self.tokens[:rows].clone()


def not_capturable(config: Any) -> str | None:
    """Why a step of a model of ``config`` cannot be captured; None if it can.

    The mask of a captured step is one for all layers, and knows of no window.
    """
    config = config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    if windowed and getattr(config, "use_sliding_window", True):
        return f"{config.model_type} attends to a sliding window of {config.sliding_window} tokens"
    if changing := sorted(kind for kind in rope_types(config) if "dynamic" in kind or kind == "longrope"):
        return f"{config.model_type}'s rotary embedding is {', '.join(changing)}: the CPU looks at positions every step"
    return None


class _ColumnLayer(CacheLayerMixin):
    """A block's keys and values ``[>= rows, kv_heads, capacity, head_dim]``, written at the column that a tensor says;
    all columns are given to attention, whose mask knows which are written."""

    is_sliding = False
    is_compileable = True

    def __init__(self, column: Tensor) -> None:
        super().__init__()
        self.column = column
        self.rows = MAX_ROWS
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a captured step's buffers are there before the step")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0  # only asked for to make a mask or positions, which are given

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


def _like(cache: BufferCache, *, rows: int, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys' and values' buffers of zeros (a masked column must be finite) for every block."""

    def buffer(used: Tensor) -> Tensor:
        return used.new_zeros(rows, used.shape[1], capacity, used.shape[3])

    pairs = [tuple(buffer(t) for t in layer.used()) for layer in cache.buffers]
    return [k for k, _ in pairs], [v for _, v in pairs]
