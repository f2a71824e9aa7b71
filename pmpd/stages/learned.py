"""The learned scheduler: features of the seed prompts, and training on their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pmpd.artifacts import write_tensors
from pmpd.decode import prefill
from pmpd.records import class_schedules
from pmpd.schedulers import Features, save_network, train
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.labels import read_labels
from pmpd.stages.rollouts import by_length
from pmpd.stages.runtime import load, progress

NETWORK_FILE = "scheduler.safetensors"


@dataclass(frozen=True)
class FeaturesConfig:
    """What there is of a prompt after prefill at ``prefill_bits``."""

    prefill_bits: int
    batch_size: int
    runtime: RuntimeConfig


def run_features(config: FeaturesConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write, a file a batch, ``<id>.keys`` and ``<id>.values`` of the last block, ``[kv_heads, length, head_dim]``, and
    ``<id>.activations``, ``[layers, 2, hidden]``: every scheduler that learns has its features here."""
    samples, prompts = read_samples(inputs["prompts"])
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    batches = by_length(prompts, config.batch_size)
    for k, rows in enumerate(progress(batches, "features", len(batches))):
        part = out / f"batch_{k:05d}.safetensors"
        if part.exists():
            continue
        batch = [prompts[i] for i in rows]
        state = prefill(model, cell, batch, config.prefill_bits, max_new_tokens=1, activations=True)
        tensors = {}
        for row, i in enumerate(rows):
            view = state.view(row)
            assert view.activations is not None
            for name, tensor in (("keys", view.keys), ("values", view.values), ("activations", view.activations)):
                tensors[f"{samples[i].id}.{name}"] = tensor.clone().contiguous().cpu()
        write_tensors(part, tensors)
    write_summary(out, {"num_samples": len(samples)})


def read_features(path: Path) -> dict[str, Features]:
    """Features by sample id."""
    tensors: dict[str, Tensor] = {}
    for part in sorted(path.glob("batch_*.safetensors")):
        tensors |= load_file(part)
    ids = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {i: Features(*(tensors[f"{i}.{name}"] for name in ("keys", "values", "activations"))) for i in ids}


@dataclass(frozen=True)
class TrainLearnedConfig:
    """What the network looks at, what it chooses among, and how it is trained.

    Attributes:
        grid_parts: parts of M that classes are fractions of.
        max_new_tokens: M at which the labels are made.
    """

    features: list[str]
    prefill_bits: int
    levels: list[int]
    grid_parts: int
    max_new_tokens: int
    epochs: int
    learning_rate: float
    weight_decay: float
    dropout: float
    train_batch: int
    holdout: float
    seed: int


def run_train_learned(config: TrainLearnedConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Train the network on the ``features`` and ``labels`` of the seed prompts."""
    labels, features = read_labels(inputs["labels"]), read_features(inputs["features"])
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens, config.grid_parts)
    network, report = train(
        [features[i] for i in labels],
        list(labels.values()),
        len(classes),
        inputs=config.features,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        dropout=config.dropout,
        batch=config.train_batch,
        holdout=config.holdout,
        seed=config.seed,
        progress=True,
    )
    save_network(network, out / NETWORK_FILE)
    names = [c.name for c in classes]
    write_summary(
        out,
        {
            "holdout_accuracy": report.holdout_accuracy,
            "majority_accuracy": report.majority_accuracy,
            "holdout_loss": report.holdout_loss,
            "num_holdout": report.num_holdout,
            "num_train": report.num_train,
            "num_parameters": report.num_parameters,
        },
        curves={"loss": [{"epoch": i + 1, "loss": v} for i, v in enumerate(report.losses)]},
        tables={
            "confusion": [
                {"label": names[i], **{f"said {n}": row[k] for k, n in enumerate(names)}}
                for i, row in enumerate(report.confusion)
            ],
        },
    )


FEATURES = Stage("features", 3, FeaturesConfig, run_features, "a prefill of every seed prompt")
TRAIN_LEARNED = Stage("train_learned", 2, TrainLearnedConfig, run_train_learned, "seconds")
