"""One decode step of a :class:`~pmpd.decode.llama.FusedLlama` as CUDA kernels on buffers that never move.

It computes what that model's forward does for one position a row. A cache is not moved in: the kernels read where its
keys and values are from a small table in device memory, so that graphs outlive caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmpd.decode.graphs import MAX_ROWS
from pmpd.decode.llama import FusedLlama
from pmpd.decode.loop import State, context_limit
from pmpd.kernels import cuda
from pmpd.kernels.block import ADDRESSES, FIRST_COLUMNS, MAX_HIDDEN, BlockKernels, not_supported
from pmpd.records import FP16_BITS


class LlamaStep:
    """As :class:`pmpd.decode.graphs.StepBody`; ``counters`` is the binding of ``block.cu``."""

    def __init__(self, model: FusedLlama) -> None:
        """Raises:
        ValueError: a model that :func:`no_step` names a reason against.
        CudaUnavailableError, RuntimeError: as :func:`pmpd.kernels.nvrtc.compile`.
        """
        weight = model.embedding.weight
        if reason := no_step(model.config, weight.dtype):
            raise ValueError(reason)
        self.model = model
        with torch.cuda.device(weight.device):
            self.kernels = BlockKernels(model.num_heads, model.num_kv_heads, model.head_dim, weight.dtype)
        limit = context_limit(model)
        assert limit is not None
        self.turns = rotary_table(model.rotary, limit)
        self.scale = model.head_dim**-0.5
        block: Any = model.blocks[0]

        def buffer(size: int) -> Tensor:
            return torch.zeros(MAX_ROWS, size, dtype=weight.dtype, device=weight.device)

        self.hidden, self.normed = buffer(weight.shape[1]), buffer(weight.shape[1])
        self.qkv, self.attended = buffer(block.qkv.out_features), buffer(block.output.in_features)
        self.gate_up, self.gated = buffer(block.gate_up.out_features), buffer(block.down.in_features)
        self.logits = buffer(model.head.out_features)
        self.tokens = torch.zeros(MAX_ROWS, dtype=torch.int64, device=weight.device)
        self.kept_tokens, self.kept_logits = self.tokens, self.logits  # of the sequence at hand: `bind` makes its own
        self.counters = torch.zeros(ADDRESSES + 2 * len(model.blocks), dtype=torch.int64, device=weight.device)

    def bind(self, state: State) -> bool:
        cache = state.cache
        capacity = cache.buffers[0].capacity
        # New ones: what other sequences' steps returned stays as it is.
        self.kept_tokens = self.tokens.new_empty(capacity, MAX_ROWS)
        self.kept_logits = self.logits.new_empty(len(state), self.logits.shape[1])
        buffers = [t for layer in cache.buffers for t in (layer.keys, layer.values) if t is not None]
        addresses = [t.data_ptr() for t in (self.kept_tokens, self.kept_logits, *buffers)]
        host = torch.tensor([cache.length, capacity, *[0] * MAX_ROWS, *addresses]).pin_memory()
        self.counters.copy_(host, non_blocking=True)
        starts = cache.length - (state.prompt_tokens + (state.step - 1))
        self.counters[FIRST_COLUMNS : FIRST_COLUMNS + len(state)] = starts
        return False

    def result(self, column: int, rows: int) -> tuple[Tensor, Tensor]:
        return self.kept_logits, self.kept_tokens[column, :rows]

    def run(self, bits: int, rows: int) -> None:
        model = self.model
        hidden, qkv, attended = self.hidden[:rows], self.qkv[:rows], self.attended[:rows]
        torch.index_select(model.embedding.weight, 0, self.tokens[:rows], out=hidden)
        for index, block in enumerate(model.blocks):
            self._product(block.qkv, hidden, bits, qkv, norm=block.input_norm)
            self.kernels.attend(qkv, block.qkv_bias, self.turns, self.counters, index, self.scale, attended)
            self._product(block.output, attended, bits, hidden, add=True)
            self._product(block.gate_up, hidden, bits, self.gated[:rows], norm=block.mlp_norm, gate=True)
            self._product(block.down, self.gated[:rows], bits, hidden, add=True)
        self._product(model.head, hidden, FP16_BITS, self.logits[:rows], norm=model.norm)
        self.kernels.choose(self.logits[:rows], self.tokens, self.counters)

    def _product(
        self,
        layer: Any,
        x: Tensor,
        bits: int,
        out: Tensor,
        *,
        norm: Tensor | None = None,
        gate: bool = False,
        add: bool = False,
    ) -> None:
        """``out`` = (or ``+=``, with ``add``) the layer's product, without its bias, with ``x``; with the norm of ``x``
        where its weight is given, and gated where ``gate``."""
        if bits != FP16_BITS:
            residual, eps = out if add else None, self.model.eps
            cuda.matmul(x, layer.packed, bits, norm_weight=norm, norm_eps=eps, gate=gate, residual=residual, out=out)
            return
        rows = len(x)
        if norm is not None:
            self.kernels.norm(x, norm, self.normed[:rows], self.model.eps)
            x = self.normed[:rows]
        if add:
            out.addmm_(x, layer.weight.t())
        elif gate:
            torch.mm(x, layer.weight.t(), out=self.gate_up[:rows])
            self.kernels.gate(self.gate_up[:rows], out)
        else:
            torch.mm(x, layer.weight.t(), out=out)


def no_step(config: Any, dtype: torch.dtype) -> str | None:
    """Why a fused model of ``config`` has no kernels for a step; None if it has."""
    if getattr(config, "mlp_bias", False) or (
        config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    ):
        return "its products after attention have biases"
    if config.hidden_size % 8 or config.hidden_size > MAX_HIDDEN or config.intermediate_size % 8:
        return f"its sizes {config.hidden_size} and {config.intermediate_size} are not of the fused kernels"
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return not_supported(heads, config.num_key_value_heads, dim, dtype)


def rotary_table(rotary: Any, positions: int) -> Tensor:
    """Cosine and sine of every position's angles, float32 ``[positions, head_dim / 2, 2]``."""
    frequencies = rotary.inv_freq.float()
    angles = torch.arange(positions, device=frequencies.device)[:, None].float() * frequencies
    return (torch.stack((angles.cos(), angles.sin()), dim=-1) * rotary.attention_scaling).contiguous()
