"""A Llama-family model of random weights from its configuration alone, for timing where the weights are not at hand.

The nested weights are made where they are used, packed: no 16-bit copy of the model exists unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pmpd.decode.llama import FusedBlock, FusedLlama, head_dim, linear
from pmpd.quant import NestedLinear, NestedWeight, PrecisionCell

WORD_BITS = 32


def random_llama(
    config: Any,
    bits: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    keep_original: bool = True,
    seed: int = 0,
) -> tuple[FusedLlama, PrecisionCell | None]:
    """A model of ``config``'s sizes and the cell of its layers; None without ``bits``, for 16 bits alone.

    Weights are of standard deviation ``1 / sqrt(in_features)``, so that activations stay of the size that a trained
    model's have. Original and nested weights are independent of each other.

    Args:
        keep_original: the block linears at 16 bits as well; a precision of the model only then.

    Raises:
        ValueError: a configuration that :func:`pmpd.decode.llama.not_fusable` names a reason against.
    """
    generator = torch.Generator(device).manual_seed(seed)
    cell = PrecisionCell() if bits else None
    hidden, intermediate, heads = config.hidden_size, config.intermediate_size, head_dim(config)
    qkv_rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * heads

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, std, generator=generator)

    def norm() -> nn.Parameter:
        return nn.Parameter(torch.ones(hidden, device=device, dtype=dtype), requires_grad=False)

    def layer(rows: int, columns: int, bias: bool = False) -> nn.Module:
        std = columns**-0.5
        shift = normal(rows, std=0.02) if bias else None
        if cell is None:
            return linear(normal(rows, columns, std=std), shift)
        words = -(-columns // WORD_BITS)
        planes = torch.randint(
            -(1 << 31), 1 << 31, (max(bits), rows, words), device=device, dtype=torch.int32, generator=generator
        )
        tables = {b: normal(rows, 1, 1 << b, std=std).half().sort(-1).values for b in sorted(bits)}
        nested = NestedWeight(planes, tables, columns)
        if keep_original:
            return NestedLinear(nested, linear(normal(rows, columns, std=std), shift), cell)
        return NestedLinear.without_original(nested, shift, dtype, cell)

    blocks = [
        FusedBlock(
            norm(),
            layer(qkv_rows, hidden, bias=config.model_type == "qwen2"),
            layer(hidden, config.num_attention_heads * heads),
            norm(),
            layer(2 * intermediate, hidden),
            layer(hidden, intermediate),
        )
        for _ in range(config.num_hidden_layers)
    ]
    embedding = nn.Embedding(config.vocab_size, hidden, _weight=normal(config.vocab_size, hidden, std=1.0))
    head = linear(embedding.weight if config.tie_word_embeddings else normal(config.vocab_size, hidden, std=0.1))
    return FusedLlama(config, embedding, blocks, norm(), head).eval().requires_grad_(False), cell
