"""The nested quantisers, and the refit of what they leave: killed in block k, they resume in block k.

All leave the same kind of artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pmpd.artifacts import write_tensors
from pmpd.models import LazyWeights, linear_names
from pmpd.models.blocks import SHARDS
from pmpd.quant import JointOptions, NestedWeight, quantize_jointly, quantize_weight, refit_tables
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.calibration import by_block, shard
from pmpd.stages.runtime import progress


@dataclass(frozen=True)
class QuantizeConfig:
    """The nested any-precision quantiser. An error in a weight counts its sensitivity to the ``sensitivity_power``."""

    seed_bits: int
    parent_bits: int
    group_size: int | None
    solver: str
    sensitivity_power: float
    trust_remote_code: bool


def run_quantize(config: QuantizeConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Quantise every block linear to its nested form by k-means, weighted by the ``sensitivity`` input.

    Without that input all weights count the same: plain k-means.
    """

    def quantize(weight: Tensor, sensitivity: Tensor | None) -> NestedWeight:
        return quantize_weight(
            weight.float(),
            torch.ones_like(weight, dtype=torch.float32)
            if sensitivity is None
            else sensitivity.float() ** config.sensitivity_power,
            seed_bits=config.seed_bits,
            parent_bits=config.parent_bits,
            group_size=config.group_size,
            solver=config.solver,
        )

    quantize_blocks(quantize, inputs["model"], inputs.get("sensitivity"), config.trust_remote_code, out)


@dataclass(frozen=True)
class QuantizeJointConfig:
    """The joint quantiser (``pmpd.quant.joint``)."""

    seed_bits: int
    parent_bits: int
    group_size: int | None
    focus_bits: int
    high_share: float
    damping: float
    refits: int
    sweeps: int
    outlier_share: float
    device: str
    trust_remote_code: bool


def run_quantize_joint(config: QuantizeJointConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Quantise every block linear under the second moments of the ``moments`` input."""
    options = JointOptions(
        config.focus_bits, config.high_share, config.damping, config.refits, config.sweeps, config.outlier_share
    )

    def quantize(weight: Tensor, moment: Tensor | None) -> NestedWeight:
        assert moment is not None
        return quantize_jointly(
            weight.to(config.device).float(),
            moment.to(config.device).float(),
            seed_bits=config.seed_bits,
            parent_bits=config.parent_bits,
            group_size=config.group_size,
            options=options,
        )

    quantize_blocks(quantize, inputs["model"], inputs["moments"], config.trust_remote_code, out)


def quantize_blocks(
    quantize: Callable[[Tensor, Tensor | None], NestedWeight],
    model: Path,
    statistics: Path | None,
    trust_remote_code: bool,
    out: Path,
) -> None:
    """One safetensors shard a block, of each layer's weight and the tensor that ``statistics`` has of its name.

    Memory is bounded by a layer and a block's packed result: weights and statistics are read a tensor at a time. A
    shard that a killed run finished is kept.
    """
    weights = LazyWeights(model)
    blocks = by_block(linear_names(model, trust_remote_code))
    num_weights = stored_bytes = 0
    precisions: set[int] = set()
    for block, names in progress(blocks.items(), "quantise", len(blocks)):
        file = out / shard(block)
        if not file.exists():
            tensors: dict[str, Tensor] = {}
            weighting = None if statistics is None else safe_open(statistics / shard(block), framework="pt")
            for name in names:
                own = None if weighting is None else weighting.get_tensor(name)
                tensors |= quantize(weights.weight(name), own).to_tensors(name)
            write_tensors(file, tensors)
        stored_bytes += file.stat().st_size
        with safe_open(file, framework="pt") as stored:
            precisions = {int(k.rpartition(".")[2]) for k in stored.keys() if ".centroids." in k}  # noqa: SIM118
            for name in names:
                columns = int(stored.get_tensor(f"{name}.layout")[0])
                num_weights += stored.get_slice(f"{name}.planes").get_shape()[1] * columns
    write_summary(
        out,
        {
            "num_blocks": len(blocks),
            "num_weights": num_weights,
            "stored_bits_per_weight": 8 * stored_bytes / num_weights,
            "seed_bits": min(precisions),
            "parent_bits": max(precisions),
        },
    )


@dataclass(frozen=True)
class RefitTablesConfig:
    """How far tables are refitted (``pmpd.quant.refit``)."""

    steps: int
    damping: float
    device: str


def run_refit_tables(config: RefitTablesConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """The ``nested`` input, whatever made it, with tables refitted under the ``moments`` input; codes stay."""
    weights = LazyWeights(inputs["model"])
    files = sorted(inputs["nested"].glob(SHARDS))
    for file in progress(files, "refit", len(files)):
        if (out / file.name).exists():
            continue
        tensors = load_file(file)
        with safe_open(inputs["moments"] / file.name, framework="pt") as moments:
            for name in moments.keys():  # noqa: SIM118
                own = refit_tables(
                    weights.weight(name).to(config.device).float(),
                    NestedWeight.from_tensors(tensors, name),
                    moments.get_tensor(name),
                    steps=config.steps,
                    damping=config.damping,
                )
                tensors |= own.to_tensors(name)
        write_tensors(out / file.name, tensors)
    write_summary(out, read_summary(inputs["nested"])["metrics"])


QUANTIZE = Stage("quantize", 1, QuantizeConfig, run_quantize, "k-means over every weight")
QUANTIZE_JOINT = Stage(
    "quantize_joint",
    3,
    QuantizeJointConfig,
    run_quantize_joint,
    "error feedback and descents over every weight",
)
REFIT_TABLES = Stage("refit_tables", 1, RefitTablesConfig, run_refit_tables, "conjugate gradients over every table")
