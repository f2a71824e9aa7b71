"""A KV cache of known capacity: written in place, copied only as far as it is used.

Owns the buffers of every block. Knows neither prompts nor padding: a position is a column.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """``cache`` under the name that the forward of ``model`` has for it (``transformers`` 5.24 renamed it)."""
    return {_cache_argument(type(model)): cache}  # type: ignore[arg-type]


@functools.cache
def _cache_argument(model_type: type[nn.Module]) -> str:
    return "cache" if "cache" in inspect.signature(model_type.forward).parameters else "past_key_values"


class BufferLayer(CacheLayerMixin):
    """Keys and values of one block in buffers ``[rows, kv_heads, capacity, head_dim]``, of which a corner is in use.

    A step writes one column where ``transformers``' DynamicCache copies the whole cache to append it.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.rows = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first states."""
        self.rows = key_states.shape[0]
        self.keys = _buffer(key_states, self.rows, self.capacity)
        self.values = _buffer(value_states, self.rows, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append ``[rows, kv_heads, n, head_dim]`` and return views of everything in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[2]
        assert end <= self.capacity, f"cache of {self.capacity} columns asked to hold {end}"
        self.keys[: self.rows, :, self.length : end] = key_states
        self.values[: self.rows, :, self.length : end] = value_states
        self.length = end
        return self.used()

    def used(self) -> tuple[Tensor, Tensor]:
        """Views ``[rows, kv_heads, length, head_dim]`` of keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def copy(self, rows: Tensor | None) -> BufferLayer:
        """A layer of the same capacity with copies of ``rows`` (all if None)."""
        new = BufferLayer(self.capacity)
        keys, values = self.used()
        new.rows, new.length = len(keys) if rows is None else len(rows), self.length
        new.keys, new.values = _buffer(keys, new.rows, self.capacity), _buffer(values, new.rows, self.capacity)
        for buffer, source in ((new.keys, keys), (new.values, values)):
            if rows is None:
                buffer[:, :, : self.length] = source
            else:
                for to, row in enumerate(rows.tolist()):  # one copy, where indexing would make a second
                    buffer[to, :, : self.length] = source[row]
        new.is_initialized = True
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the mask of the next ``query_length`` positions covers, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class BufferCache(Cache):
    """The cache of all blocks."""

    def __init__(self, buffers: Sequence[BufferLayer]) -> None:
        super().__init__(layers=list(buffers))
        self.buffers = tuple(buffers)

    @classmethod
    def empty(cls, num_layers: int, capacity: int) -> BufferCache:
        """A cache for ``num_layers`` blocks; memory is taken at the first forward, for its batch."""
        return cls([BufferLayer(capacity) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Columns in use."""
        return self.buffers[0].length

    def fork(self, rows: Tensor | None = None) -> BufferCache:
        """An independent cache with copies of ``rows`` (int64, all if None); only the columns in use are copied."""
        return BufferCache([layer.copy(rows) for layer in self.buffers])

    def advance(self) -> None:
        """Count in one more column, which someone else has written."""
        for layer in self.buffers:
            layer.length += 1

    def move(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Go on in these buffers, ``[>= rows, kv_heads, >= capacity, head_dim]`` a block; what is in use is copied."""
        for layer, *buffers in zip(self.buffers, keys, values, strict=True):
            for buffer, used in zip(buffers, layer.used(), strict=True):
                buffer[: layer.rows, :, : layer.length] = used
            layer.keys, layer.values = buffers

    def keep(self, order: Tensor) -> None:
        """Let row i be what row ``order[i]`` was, in place; rows beyond ``len(order)`` are given up.

        Only rows that move are copied. ``order`` is int64 ``[n]`` and moves no row to a higher index.
        """
        moves = [(to, row) for to, row in enumerate(order.tolist()) if to != row]
        assert all(to < row for to, row in moves)
        for layer in self.buffers:
            for buffer in layer.used():
                for to, row in moves:
                    buffer[to] = buffer[row]
            layer.rows = len(order)


def _buffer(like: Tensor, rows: int, capacity: int) -> Tensor:
    return torch.empty((rows, like.shape[1], capacity, like.shape[3]), dtype=like.dtype, device=like.device)
