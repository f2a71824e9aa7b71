"""Models of the Llama family with q,k,v and gate,up as one product each: fewer, larger products.

Plain PyTorch on any device, called as a ``transformers`` model is. It prefills, and it is the definition of what one
decode step computes; the kernels of such a step are in ``llama_step.py``, unknown here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from pmpd.decode.cache import BufferCache
from pmpd.kernels.gated import TURN, gated, in_turns
from pmpd.quant import NestedLinear, NestedWeight, Outliers, PrecisionCell

FAMILY = ("llama", "mistral", "qwen2")
"""``model_type`` of the models whose blocks compute what :class:`FusedBlock` does (Vicuna, MobileLLaMA and SmolLM2 are
``llama``)."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not change with the length of a sequence."""


class FusedBlock(nn.Module):
    """One decoder block: four products, two norms.

    Attributes:
        qkv: ``[hidden] -> [(heads + 2 * kv_heads) * head_dim]``, queries first.
        gate_up: ``[hidden] -> [2 * intermediate]``, gate and up in turns (:func:`pmpd.kernels.gated.in_turns`).
    """

    input_norm: nn.Parameter
    mlp_norm: nn.Parameter

    def __init__(
        self,
        input_norm: nn.Parameter,
        qkv: nn.Module,
        output: nn.Module,
        mlp_norm: nn.Parameter,
        gate_up: nn.Module,
        down: nn.Module,
    ) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = input_norm, mlp_norm
        self.qkv, self.output, self.gate_up, self.down = qkv, output, gate_up, down

    @property
    def qkv_bias(self) -> nn.Parameter | None:
        bias: Any = self.qkv.bias
        return bias


class FusedLlama(nn.Module):
    """A decoder of :class:`FusedBlock` with the forward's arguments of ``transformers`` that this library uses."""

    def __init__(
        self, config: Any, embedding: nn.Embedding, blocks: Sequence[FusedBlock], norm: nn.Parameter, head: nn.Linear
    ) -> None:
        """
        Args:
            config: the model's configuration; sizes, epsilon and rotary embedding are read from it.

        Raises:
            ValueError: a configuration that :func:`not_fusable` names a reason against.
        """
        super().__init__()
        if reason := not_fusable(config):
            raise ValueError(reason)
        self.config = config
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.eps: float = config.rms_norm_eps
        self.embedding, self.norm, self.head = embedding, norm, head
        self.blocks: Sequence[FusedBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.rotary = rotary_embedding(config).to(embedding.weight.device)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: BufferCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits ``[rows, kept, vocab]`` after ``input_ids`` ``[rows, n]``, whose KV is appended to the cache.

        Args:
            position_ids: int64 ``[rows, n]``; None counts on from the columns in use.
            attention_mask: bool ``[rows, columns in use + n]``, False at padding; None if there is none.
            cache: the cache; None to read ``input_ids`` alone.
            use_cache: of no effect; the cache decides.
            logits_to_keep: last positions to give logits of; 0 for all.
        """
        num_rows, n = input_ids.shape
        used = 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = torch.arange(used, used + n, device=input_ids.device)[None]
        hidden = self.embedding(input_ids)
        cos, sin = (table[:, None] for table in self.rotary(hidden, position_ids))
        mask = attention_columns(attention_mask, used, n)
        for index, block in enumerate(self.blocks):
            qkv = block.qkv(rms_norm(hidden, block.input_norm, self.eps))
            heads = qkv.view(num_rows, n, -1, self.head_dim).transpose(1, 2)
            q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if cache is not None:
                k, v = cache.update(k, v, index)
            attended = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, enable_gqa=self.num_heads > self.num_kv_heads
            )
            hidden = hidden + block.output(attended.transpose(1, 2).flatten(2))
            hidden = hidden + block.down(gated(block.gate_up(rms_norm(hidden, block.mlp_norm, self.eps))))
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return CausalLMOutputWithPast(logits=self.head(rms_norm(kept, self.norm, self.eps)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 as the originals do, rounded before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[rows, heads, n, head_dim]``; channel i turns with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_columns(mask: Tensor | None, used: int, n: int) -> Tensor | None:
    """Which columns each of ``n`` new positions looks at: bool ``[rows, 1, n, used + n]``; None where causality says
    all there is to say.

    A padded position looks at itself, so that no softmax is over nothing (NaN would spread).
    """
    if mask is None and (n == 1 or used == 0):
        return None
    device = None if mask is None else mask.device
    columns = torch.arange(used + n, device=device)
    own = torch.arange(used, used + n, device=device)[:, None]
    causal = columns <= own
    if mask is None:
        return causal[None, None]
    return ((causal & mask[:, None]) | (columns == own))[:, None]


def head_dim(config: Any) -> int:
    """Channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_embedding(config: Any) -> nn.Module:
    """``transformers``' own module of the model's rotary embedding: it knows every scaling."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)


def not_fusable(config: Any) -> str | None:
    """Why a model of ``config`` is not one that :class:`FusedLlama` computes; None if it is."""
    if config.model_type not in FAMILY:
        return f"model type {config.model_type} is not of the Llama family ({', '.join(FAMILY)})"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if config.intermediate_size % TURN:
        return f"its intermediate size {config.intermediate_size} is not a multiple of {TURN}"
    windowed = getattr(config, "sliding_window", None) is not None
    if windowed and getattr(config, "use_sliding_window", True):
        return f"it attends to a sliding window of {config.sliding_window} tokens"
    if other := sorted(rope_types(config).difference(STATIC_ROPE)):
        return f"its rotary embedding is of type {', '.join(other)}, not one of {', '.join(STATIC_ROPE)}"
    return None


def rope_types(config: Any) -> set[str]:
    """Types of the model's rotary embeddings; some models have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    return {one.get("rope_type", "default") for one in by_layer or [parameters]}


def fuse(model: Any, cell: PrecisionCell | None) -> tuple[FusedLlama, PrecisionCell | None]:
    """``model`` as a :class:`FusedLlama`, and the cell that its layers share (None if ``cell`` is).

    ``model`` is used up block by block, so that never more than one block's weights are there twice.

    Raises:
        ValueError: a model that :func:`not_fusable` names a reason against.
    """
    if reason := not_fusable(model.config):
        raise ValueError(reason)
    fused_cell = None if cell is None else PrecisionCell()
    decoder = model.model
    blocks = []
    for index in range(len(decoder.layers)):
        layer = decoder.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        blocks.append(
            FusedBlock(
                layer.input_layernorm.weight,
                _join([attention.q_proj, attention.k_proj, attention.v_proj], fused_cell),
                _join([attention.o_proj], fused_cell),
                layer.post_attention_layernorm.weight,
                _join([mlp.gate_proj, mlp.up_proj], fused_cell, in_turns),
                _join([mlp.down_proj], fused_cell),
            )
        )
        decoder.layers[index] = nn.Identity()
    fused = FusedLlama(model.config, decoder.embed_tokens, blocks, decoder.norm.weight, model.lm_head)
    return fused.eval().requires_grad_(False), fused_cell


def _rows(*parts: Tensor, dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _join(layers: Sequence[nn.Module], cell: PrecisionCell | None, join: Callable[..., Tensor] = _rows) -> nn.Module:
    """The rows of ``layers`` in one linear layer, nested where they are, in the order that ``join`` gives them."""
    first: Any = layers[0]

    def joined(parts: Sequence[Any], dim: int = 0) -> Tensor:
        return join(*(part.detach() for part in parts), dim=dim)

    bias = None if first.bias is None else joined([layer.bias for layer in layers])
    original = None if first.weight is None else linear(joined([layer.weight for layer in layers]), bias)
    if not isinstance(first, NestedLinear):
        assert original is not None
        return original
    assert cell is not None
    parts = [layer.nested for layer in layers if isinstance(layer, NestedLinear) and layer.nested is not None]
    assert len(parts) == len(layers), "layers are joined before they are packed"
    one = parts[0]
    order = joined(torch.arange(sum(part.out_features for part in parts)).split([part.out_features for part in parts]))
    nested = NestedWeight(
        joined([part.planes for part in parts], dim=1),
        {bits: joined([part.centroids[bits] for part in parts]) for bits in one.centroids},
        one.in_features,
        one.group_size,
        None if one.outliers is None else Outliers.stacked([p.outliers for p in parts if p.outliers]).rows(order),
    )
    if original is None:
        return NestedLinear.without_original(nested, bias, first.anchor.dtype, cell)
    return NestedLinear(nested, original, cell)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of these very tensors, without gradients."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer
