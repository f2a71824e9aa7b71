"""Training the learned scheduler's network on labelled prompts.

Owns the split, the balancing and the report. Does not know where labels come from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pmpd.schedulers.network import KV, LearnedNetwork


@dataclass(frozen=True)
class Features:
    """What there is of one prompt.

    Attributes:
        keys: of the last block, ``[kv_heads, length, head_dim]`` of any float type and any length; values alike.
        activations: ``[layers, 2, hidden]``, mean and variance over positions of every block's output.
    """

    keys: Tensor
    values: Tensor
    activations: Tensor | None = None


@dataclass(frozen=True)
class TrainReport:
    """How training went. The held-out part is never balanced, so its accuracy is that of the labels as they fall.

    Attributes:
        holdout_accuracy: of the network.
        majority_accuracy: of always saying the training part's commonest class, on the same samples.
        num_parameters: of the network.
        holdout: indices of the held-out samples.
        confusion: ``confusion[label][said]``, held-out samples.
        label_counts: by class, all samples.
        losses: mean cross-entropy in nats of each epoch over the balanced training part.
        holdout_loss: mean cross-entropy in nats of the held-out samples after the last epoch.
    """

    holdout_accuracy: float
    majority_accuracy: float
    num_train: int
    num_holdout: int
    num_parameters: int
    holdout: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...]
    label_counts: tuple[int, ...]
    losses: tuple[float, ...]
    holdout_loss: float


def train(
    features: Sequence[Features],
    labels: Sequence[int],
    num_classes: int,
    *,
    inputs: Sequence[str] = (KV,),
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    dropout: float,
    batch: int,
    holdout: float,
    seed: int,
    progress: bool = False,
) -> tuple[LearnedNetwork, TrainReport]:
    """Train on cross-entropy with AdamW; the same arguments give the same network.

    Each epoch shows every class of the training part equally often: the samples of the rarer ones are repeated,
    each as often as the next, give or take one.

    Args:
        labels: a class for each, from 0 to ``num_classes - 1``.
        inputs: which features the network looks at.
        holdout: fraction of samples kept from training, at least one sample, chosen by ``seed``.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: fewer than 2 samples, as many labels as features not given, or a label out of range.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features, {len(labels)} labels")
    if len(features) < 2:
        raise ValueError(f"{len(features)} samples: at least 2, one to train on and one held out")
    if bad := sorted({k for k in labels if not 0 <= k < num_classes}):
        raise ValueError(f"labels {bad} are not among the {num_classes} classes 0 to {num_classes - 1}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator).tolist()
    num_holdout = min(max(1, round(holdout * len(features))), len(features) - 1)
    held_out, training = sorted(order[:num_holdout]), sorted(order[num_holdout:])

    kv_heads, _, head_dim = features[0].keys.shape
    num_layers, _, hidden_size = (0, 2, 0) if features[0].activations is None else features[0].activations.shape
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from the global generator
        torch.manual_seed(seed)
        network = LearnedNetwork(
            kv_heads,
            head_dim,
            num_classes,
            features=inputs,
            num_layers=num_layers,
            hidden_size=hidden_size,
            dropout=dropout,
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        losses = []
        for _ in tqdm(range(epochs), desc="train", unit="epoch", disable=None if progress else True, leave=False):
            rows = [training[r] for r in balanced_order([labels[i] for i in training], generator)]
            losses.append(_epoch(network, optimizer, features, labels, rows, batch))
    network.eval()
    return network, _report(network, features, labels, num_classes, training, held_out, losses)


def _epoch(
    network: LearnedNetwork,
    optimizer: torch.optim.Optimizer,
    features: Sequence[Features],
    labels: Sequence[int],
    rows: Sequence[int],
    batch: int,
) -> float:
    """A step for each ``batch`` of ``rows``; the mean loss."""
    network.train()
    total = 0.0
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        target = torch.tensor([labels[i] for i in chosen])
        loss = functional.cross_entropy(network(*pad([features[i] for i in chosen])), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(chosen)
    return total / len(rows)


def _report(
    network: LearnedNetwork,
    features: Sequence[Features],
    labels: Sequence[int],
    num_classes: int,
    training: Sequence[int],
    held_out: Sequence[int],
    losses: Sequence[float],
) -> TrainReport:
    in_training = Counter(labels[i] for i in training)
    majority = max(range(num_classes), key=in_training.__getitem__)
    with torch.no_grad():
        logits = torch.cat([network(*pad([features[i]])) for i in held_out])
    confusion = [[0] * num_classes for _ in range(num_classes)]
    for i, said in zip(held_out, logits.argmax(-1).tolist(), strict=True):
        confusion[labels[i]][said] += 1
    return TrainReport(
        holdout_accuracy=sum(confusion[k][k] for k in range(num_classes)) / len(held_out),
        majority_accuracy=sum(labels[i] == majority for i in held_out) / len(held_out),
        num_train=len(training),
        num_holdout=len(held_out),
        num_parameters=network.num_parameters,
        holdout=tuple(held_out),
        confusion=tuple(map(tuple, confusion)),
        label_counts=tuple(labels.count(k) for k in range(num_classes)),
        losses=tuple(losses),
        holdout_loss=float(functional.cross_entropy(logits, torch.tensor([labels[i] for i in held_out]))),
    )


def balanced_order(labels: Sequence[int], generator: torch.Generator) -> list[int]:
    """Indices into ``labels`` in random order, each class as often as the commonest one occurs."""
    members = [[i for i, k in enumerate(labels) if k == c] for c in sorted(set(labels))]
    size = max(map(len, members))
    rows: list[int] = []
    for own in members:
        repeats = [torch.randperm(len(own), generator=generator) for _ in range(math.ceil(size / len(own)))]
        rows += [own[i] for i in torch.cat(repeats)[:size].tolist()]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def pad(features: Sequence[Features]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys and values, float32 ``[batch, kv_heads, longest, head_dim]``, zeros at the end; their mask; activations."""
    lengths = torch.tensor([own.keys.shape[1] for own in features])
    longest = int(lengths.max())
    heads, _, dim = features[0].keys.shape
    both = torch.zeros(2, len(features), heads, longest, dim)
    for i, own in enumerate(features):
        both[0, i, :, : lengths[i]] = own.keys
        both[1, i, :, : lengths[i]] = own.values
    activations = [own.activations for own in features if own.activations is not None]
    return both[0], both[1], torch.arange(longest) < lengths[:, None], torch.stack(activations) if activations else None
