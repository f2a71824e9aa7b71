"""What a quantiser weights its errors by, from a backward pass over calibration text: sensitivity, second moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pmpd.artifacts import write_tensors
from pmpd.models import block_index, block_linears
from pmpd.quant import accumulate, accumulate_moments
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_windows
from pmpd.stages.runtime import load, progress

MOMENT_GIB = 8.0
"""Second moments held at once; a model with more takes several passes over the text."""


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
    for block, names in by_block(sensitivity).items():
        write_tensors(out / shard(block), {name: sensitivity[name].to(torch.bfloat16) for name in names})
    write_summary(
        out,
        {"num_windows": windows.shape[0], "window_tokens": windows.shape[1], "num_layers": len(sensitivity)},
    )


@dataclass(frozen=True)
class MomentsConfig:
    """How the moments are computed; over which text is the ``texts`` input."""

    runtime: RuntimeConfig


def run_moments(config: MomentsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Gradient-weighted second moment of every block linear's inputs, one float32 file a block.

    Blocks go in passes of at most :data:`MOMENT_GIB`; a killed run goes on at the pass that it was in.
    """
    windows = read_windows(inputs["texts"])
    model, _ = load(inputs["model"], None, config.runtime)
    layers = block_linears(model)
    blocks = by_block(layers)
    passes: list[list[int]] = [[]]
    held = 0.0
    for block, names in blocks.items():
        gib = sum(4 * layers[name].in_features ** 2 for name in names) / 2**30
        if passes[-1] and held + gib > MOMENT_GIB:
            passes.append([])
            held = 0.0
        passes[-1].append(block)
        held += gib
    for number, part in enumerate(passes, 1):
        wanted = [block for block in part if not (out / shard(block)).exists()]
        if not wanted:
            continue
        chosen = {name: layers[name] for block in wanted for name in blocks[block]}
        label = "moments" if len(passes) == 1 else f"moments, pass {number} of {len(passes)}"
        moments = accumulate_moments(model, progress(windows, label, len(windows)), chosen)
        for block in wanted:
            write_tensors(out / shard(block), {name: moments.pop(name).cpu() for name in blocks[block]})
    write_summary(
        out,
        {
            "num_windows": windows.shape[0],
            "window_tokens": windows.shape[1],
            "num_layers": len(layers),
            "num_passes": len(passes),
        },
    )


def by_block(names: Iterable[str]) -> dict[int, list[str]]:
    """Layer names by the block that they are in."""
    blocks: dict[int, list[str]] = defaultdict(list)
    for name in names:
        blocks[block_index(name)].append(name)
    return dict(sorted(blocks.items()))


def shard(block: int) -> str:
    """The file of a block, in every artifact that has one a block."""
    return f"block_{block:03d}.safetensors"


SENSITIVITY = Stage("sensitivity", 1, SensitivityConfig, run_sensitivity, "a backward pass over the calibration text")
MOMENTS = Stage("moments", 1, MomentsConfig, run_moments, "a backward pass over the calibration text")
