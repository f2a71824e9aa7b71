"""Sensitivity, and the nested quantiser that it weights: killed in block k, the quantiser resumes in block k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pmpd.artifacts import write_tensors
from pmpd.models import LazyWeights, block_index, block_linears, linear_names
from pmpd.quant import accumulate, quantize_weight
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_windows
from pmpd.stages.runtime import load, progress


@dataclass(frozen=True)
class SensitivityConfig:
    """How the squared gradients are computed; over which text is the ``texts`` input."""

    runtime: RuntimeConfig


def run_sensitivity(config: SensitivityConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Mean squared gradient of the language-model loss for every block linear, one bfloat16 file a block.

    bfloat16 keeps float32's range, which squared gradients need, at a relative error of at most 0.4 %.
    """
    windows = read_windows(inputs["texts"])
    model, _ = load(inputs["model"], None, config.runtime)
    sensitivity = accumulate(model, progress(windows, "sensitivity", len(windows)), block_linears(model))
    for block, names in _by_block(sensitivity).items():
        write_tensors(out / _shard(block), {name: sensitivity[name].to(torch.bfloat16) for name in names})
    write_summary(
        out,
        {"num_windows": windows.shape[0], "window_tokens": windows.shape[1], "num_layers": len(sensitivity)},
    )


@dataclass(frozen=True)
class QuantizeConfig:
    """The nested any-precision quantiser."""

    seed_bits: int
    parent_bits: int
    group_size: int | None
    solver: str
    trust_remote_code: bool


def run_quantize(config: QuantizeConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Quantise every block linear to its nested form, one safetensors shard a block.

    Without the input ``sensitivity`` all weights count the same: plain k-means.

    Memory is bounded by a layer's weights and a block's sensitivities. A shard that a killed run finished is kept.
    """
    weights = LazyWeights(inputs["model"])
    blocks = _by_block(linear_names(inputs["model"], config.trust_remote_code))
    num_weights = stored_bytes = 0
    for block, names in progress(blocks.items(), "quantise", len(blocks)):
        shard = out / _shard(block)
        if not shard.exists():
            tensors: dict[str, torch.Tensor] = {}
            sensitivity = _sensitivity_of(inputs.get("sensitivity"), block)
            for name in names:
                weight = weights.weight(name).float()
                tensors |= quantize_weight(
                    weight,
                    sensitivity[name].float() if sensitivity else torch.ones_like(weight),
                    seed_bits=config.seed_bits,
                    parent_bits=config.parent_bits,
                    group_size=config.group_size,
                    solver=config.solver,
                ).to_tensors(name)
            write_tensors(shard, tensors)
        stored_bytes += shard.stat().st_size
        with safe_open(shard, framework="pt") as stored:
            for name in names:
                columns = int(stored.get_tensor(f"{name}.layout")[0])
                num_weights += stored.get_slice(f"{name}.planes").get_shape()[1] * columns
    write_summary(
        out,
        {
            "num_blocks": len(blocks),
            "num_weights": num_weights,
            "stored_bits_per_weight": 8 * stored_bytes / num_weights,
            "seed_bits": config.seed_bits,
            "parent_bits": config.parent_bits,
        },
    )


def _sensitivity_of(folder: Path | None, block: int) -> dict[str, torch.Tensor]:
    """Of every linear of ``block``; empty without a folder."""
    return load_file(folder / _shard(block)) if folder is not None else {}


def _by_block(names: Mapping[str, object] | list[str]) -> dict[int, list[str]]:
    blocks: dict[int, list[str]] = defaultdict(list)
    for name in names:
        blocks[block_index(name)].append(name)
    return dict(sorted(blocks.items()))


def _shard(block: int) -> str:
    return f"block_{block:03d}.safetensors"


SENSITIVITY = Stage("sensitivity", 1, SensitivityConfig, run_sensitivity, "a backward pass over the calibration text")
QUANTIZE = Stage("quantize", 1, QuantizeConfig, run_quantize, "k-means over every weight")
