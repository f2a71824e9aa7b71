"""Decode steps as CUDA graphs: captured once for a precision and a number of rows, replayed for every step.

Owns which graph is replayed and what it is told of the sequence at hand: a switch of precision is the choice of
another graph over the same cache. Knows nothing of what a step computes; that is a :class:`StepBody`.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pmpd.decode.cache import BufferCache, with_cache
from pmpd.decode.loop import State
from pmpd.kernels import launch
from pmpd.quant import PrecisionCell

log = logging.getLogger(__name__)

MAX_ROWS = launch.MAX_ROWS
"""Rows that the kernels have a fast path for; larger batches take the model's forward."""


class StepBody(Protocol):
    """The computation of one decode step on buffers that never move.

    Attributes:
        tokens: int64 ``[MAX_ROWS]``; read by a step and replaced by the tokens that it yields.
        counters: int64, what a step changes of itself; saved and put back around a capture.
    """

    tokens: Tensor
    counters: Tensor

    def bind(self, state: State) -> bool:
        """Let the next steps be of ``state``; True if graphs captured before must go, because a buffer moved."""

    def run(self, bits: int, rows: int) -> None:
        """Queue one step of the first ``rows`` rows, and let the step after it be the next."""

    def result(self, column: int, rows: int) -> tuple[Tensor, Tensor]:
        """What :meth:`pmpd.decode.loop.StepModel.decode_step` returns for the step that wrote ``column``, the last."""


class GraphedModel(nn.Module):
    """``model`` whose decode steps are replayed. On a CPU a step is run as it is: the same logic, to be tested."""

    def __init__(self, model: nn.Module, cell: PrecisionCell | None, body: StepBody) -> None:
        super().__init__()
        self.model = model
        self.cell = cell
        self.body = body
        self.max_rows = MAX_ROWS
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._cache: weakref.ref[BufferCache] | None = None
        self._place = (0, 0)
        self._last: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        """The model's own."""
        if cache is not None:
            kwargs |= with_cache(self.model, cache)
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def decode_step(self, state: State) -> tuple[Tensor, Tensor]:
        """As :meth:`pmpd.decode.loop.StepModel.decode_step`; the first at a precision and number of rows captures."""
        assert len(state) <= self.max_rows
        with _current(state.tokens.device):
            return self._take(state)

    def _take(self, state: State) -> tuple[Tensor, Tensor]:
        rows = len(state)
        place = (rows, state.cache.length)
        if self._cache is None or self._cache() is not state.cache or self._place != place:
            if self.body.bind(state):
                self._graphs.clear()
                self._pool = None
            self._last = None
        if state.tokens is not self._last:
            self.body.tokens[:rows].copy_(state.tokens)
        if not state.tokens.is_cuda:
            self.body.run(state.bits, rows)
        else:
            if (state.bits, rows) not in self._graphs:
                self._graphs[state.bits, rows] = self._capture(state.bits, rows)
            self._graphs[state.bits, rows].replay()
        logits, self._last = self.body.result(state.cache.length, rows)
        state.cache.advance()
        self._cache, self._place = weakref.ref(state.cache), (rows, state.cache.length)
        return logits, self._last

    def _capture(self, bits: int, rows: int) -> torch.cuda.CUDAGraph:
        """A graph of one step. The step is run once before it, to compile and load what it needs, and undone."""
        tokens, counters = self.body.tokens.clone(), self.body.counters.clone()
        self.body.run(bits, rows)
        self.body.tokens.copy_(tokens)
        self.body.counters.copy_(counters)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._stream = self._stream or torch.cuda.Stream()  # PyTorch's own is of the device that captured first
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self.body.run(bits, rows)
        self._pool = graph.pool()
        log.debug("captured a step of %d rows at %d bits", rows, bits)
        return graph


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: kernels are launched, and graphs captured, there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
