"""The learned scheduler's network and its file. Knows features of a prompt, not where they come from.

What the paper says of it: input is the last block's KV cache after prefill, a small attention pooling and a light MLP.
What may stand beside or instead of the cache, for comparison: mean and variance of activations over the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from pmpd.artifacts import write_tensors

KIND = "pmpd-learned-scheduler"
FORMAT = 2
KV = "kv"
ACTIVATIONS = ("last_mean", "all_statistics")
"""The last block's output, mean over the prompt's positions; mean and variance of every block's output, over positions
and channels, two numbers a block."""


class KVPooler(nn.Module):
    """Attention over positions with one learnable query a head.

    Keys grow large in some channels, so they are normalised over ``head_dim`` before they are scored and pooled.
    """

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(kv_heads, head_dim) * 0.02)

    def forward(self, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values.

        Args:
            keys: float32 ``[batch, kv_heads, length, head_dim]``; values alike.
            mask: bool ``[batch, length]``, False at padding, whose content does not matter as long as it is finite.

        Returns:
            Two tensors ``[batch, kv_heads * head_dim]``.
        """
        keys = functional.layer_norm(keys, keys.shape[-1:])
        scores = torch.einsum("bhld,hd->bhl", keys, self.query) / keys.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        pooled = (torch.einsum("bhl,bhld->bhd", weights, x).flatten(1) for x in (keys, values))
        return next(pooled), next(pooled)


class LearnedNetwork(nn.Module):
    """Features of a prompt -> logits over classes.

    Each feature is normalised by itself, then all go through one hidden layer: about ``width * hidden`` parameters,
    ``width`` being ``2 * kv_heads * head_dim`` for the cache, ``hidden_size`` for the last block's mean and 2 a block
    for the statistics of all.

    Raises:
        ValueError: no features, one that there is not or twice.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        num_classes: int,
        *,
        features: Sequence[str] = (KV,),
        num_layers: int = 0,
        hidden_size: int = 0,
        hidden: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not features or len(set(features)) < len(features) or set(features) - {KV, *ACTIVATIONS}:
            raise ValueError(f"features={list(features)}: some of {[KV, *ACTIVATIONS]}, each once")
        self.features = tuple(features)
        self.shape = {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "features": list(features),
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "hidden": hidden,
        }
        widths = {"last_mean": hidden_size, "all_statistics": 2 * num_layers}
        widths = {name: width for name, width in widths.items() if name in features}
        width = sum(widths.values())
        if KV in features:
            self.pooler = KVPooler(kv_heads, head_dim)
            self.key_norm = nn.LayerNorm(kv_heads * head_dim)
            self.value_norm = nn.LayerNorm(kv_heads * head_dim)
            width += 2 * kv_heads * head_dim
        self.norms = nn.ModuleDict({name: nn.LayerNorm(own) for name, own in widths.items()})
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, num_classes)

    @property
    def num_classes(self) -> int:
        return self.output.out_features

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def reads_activations(self) -> bool:
        return bool(set(self.features) & set(ACTIVATIONS))

    def forward(
        self, keys: Tensor, values: Tensor, mask: Tensor | None = None, activations: Tensor | None = None
    ) -> Tensor:
        """Logits ``[batch, num_classes]``, float32.

        Args:
            keys: of the last block, any float type, ``[batch, kv_heads, length, head_dim]``; values alike.
            mask: bool ``[batch, length]``, True at real positions; None if there is no padding.
            activations: ``[batch, num_layers, 2, hidden_size]``, mean and variance over positions of every block's
                output; None if no feature is of them.

        Raises:
            ValueError: inputs of another shape than the network was made for.
        """
        parts = []
        if KV in self.features:
            parts += self._cache(keys, values, mask)
        if self.reads_activations:
            expected = (self.shape["num_layers"], 2, self.shape["hidden_size"])
            if activations is None or activations.shape[1:] != expected:
                found = None if activations is None else tuple(activations.shape[1:])
                raise ValueError(f"activations are {found}, the scheduler was trained for {expected}: another model's?")
            mean, variance = activations.float().unbind(2)
            # Over positions and channels at once: the mean of channels' variances and the variance of their means.
            total = variance.mean(-1) + mean.var(-1, correction=0)
            # Blocks differ by orders of magnitude: logarithms are comparable.
            views = {"last_mean": mean[:, -1], "all_statistics": torch.cat([mean.mean(-1), (total + 1e-6).log()], 1)}
            parts += [norm(views[name]) for name, norm in self.norms.items()]
        x = torch.cat(parts, -1)
        logits: Tensor = self.output(self.dropout(functional.relu(self.hidden(self.dropout(x)))))
        return logits

    def _cache(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> list[Tensor]:
        expected = (self.shape["kv_heads"], self.shape["head_dim"])
        for name, tensor in (("keys", keys), ("values", values)):
            if (tensor.shape[1], tensor.shape[3]) != expected:
                raise ValueError(
                    f"{name} have {tensor.shape[1]} kv_heads of head_dim {tensor.shape[3]}, "
                    f"the scheduler was trained for {expected[0]} of {expected[1]}: another model's?"
                )
        if mask is None:
            mask = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        pooled_keys, pooled_values = self.pooler(keys.float(), values.float(), mask)
        return [self.key_norm(pooled_keys), self.value_norm(pooled_values)]


def save_network(network: LearnedNetwork, path: Path) -> None:
    """Write ``network`` to a safetensors file with its shape as metadata."""
    metadata = {"kind": KIND, "format": str(FORMAT), "shape": json.dumps(network.shape)}
    write_tensors(path, {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, metadata)


def load_network(path: Path) -> LearnedNetwork:
    """The network in ``path``, ready to decide.

    Raises:
        ValueError: not a safetensors file, not a scheduler's, of a later format, or with tensors missing, too many or
            of another shape; the message names them.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} holds no learned scheduler (kind={metadata.get('kind')!r}, expected {KIND!r})")
    if metadata.get("format") != str(FORMAT):
        raise ValueError(f"{path} has format {metadata.get('format')}, this version reads {FORMAT}")
    network = LearnedNetwork(**json.loads(metadata["shape"]))
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name}: {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise ValueError(f"{path} does not match its own shape {network.shape}: {'; '.join(wrong)}")
    network.load_state_dict(tensors)
    return network.eval()
