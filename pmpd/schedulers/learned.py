"""The scheduler that reads a prompt's KV cache and chooses one of a few schedules, once a sequence.

Owns the network, its file and the decision; training is in ``train.py``. What the paper says of it: input is the
last block's KV cache after prefill, a small attention pooling and a light MLP, one forward a sequence.
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
from pmpd.records import Prefill, Schedule
from pmpd.schedulers.base import Planned

KIND = "pmpd-learned-scheduler"
FORMAT = 1


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
    """KV cache of the last block -> logits over classes. Parameters: about ``2 * kv_heads * head_dim * hidden``."""

    def __init__(
        self, kv_heads: int, head_dim: int, num_classes: int, *, hidden: int = 32, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.shape = {"kv_heads": kv_heads, "head_dim": head_dim, "num_classes": num_classes, "hidden": hidden}
        width = kv_heads * head_dim
        self.pooler = KVPooler(kv_heads, head_dim)
        self.key_norm = nn.LayerNorm(width)
        self.value_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(2 * width, hidden)
        self.output = nn.Linear(hidden, num_classes)

    @property
    def num_classes(self) -> int:
        return self.shape["num_classes"]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[batch, num_classes]``, float32.

        Args:
            keys: any float type, ``[batch, kv_heads, length, head_dim]``; values alike.
            mask: bool ``[batch, length]``, True at real positions; None if there is no padding.

        Raises:
            ValueError: keys or values of another shape than the network was made for.
        """
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
        x = torch.cat([self.key_norm(pooled_keys), self.value_norm(pooled_values)], -1)
        logits: Tensor = self.output(self.dropout(functional.relu(self.hidden(self.dropout(x)))))
        return logits


class Learned:
    """Chooses the class with the largest logit.

    ``classes`` are schedules at the task's M, all with prefill at ``prefill_bits``, in the order of the labels.

    Raises:
        ValueError: another number of classes than the network's, or another prefill precision.
    """

    def __init__(self, network: LearnedNetwork, prefill_bits: int, classes: Sequence[Schedule]) -> None:
        if len(classes) != network.num_classes:
            raise ValueError(f"{len(classes)} classes given, the network was trained for {network.num_classes}")
        if any(schedule.prefill_bits != prefill_bits for schedule in classes):
            raise ValueError(f"prefill_bits={prefill_bits}, but the classes are {[s.name for s in classes]}")
        self.network = network.eval()
        self.prefill_bits = prefill_bits
        self.classes = tuple(classes)

    def begin(self, prefill: Prefill) -> Planned:
        """One forward of the network; on a GPU one synchronisation, the only one a sequence."""
        device = self.network.pooler.query.device
        with torch.no_grad():
            logits = self.network(prefill.keys[None].to(device), prefill.values[None].to(device))
        return Planned(self.classes[int(logits.argmax())])


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
