"""Tunes a nested model's tables to the 16-bit model's answers; killed at a precision, it resumes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from pmpd.artifacts import write_tensors
from pmpd.models import attach, load_model
from pmpd.models.blocks import SHARDS
from pmpd.quant import NestedLinear, tune_tables
from pmpd.stages.base import RuntimeConfig, Stage, read_summary, write_summary
from pmpd.stages.inputs import read_windows

DIVERGENCE = "divergence"


@dataclass(frozen=True)
class TuneTablesConfig:
    """Which precisions' tables, and how far; over which text is the ``texts`` input."""

    bits: list[int]
    steps: int
    rate: float
    batch_size: int
    runtime: RuntimeConfig


def run_tune_tables(config: TuneTablesConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """The ``nested`` input with tuned tables, shard by shard."""
    tables: dict[str, torch.Tensor] = {}
    summary = read_summary(inputs["nested"])["metrics"]
    parts = [out / f"tables_{bits}.safetensors" for bits in config.bits]
    for bits, part in zip(config.bits, parts, strict=True):
        if not part.exists():
            write_tensors(part, _tune(bits, config, inputs))
        tables |= load_file(part)
        seen = tables.pop(DIVERGENCE)
        quarter = max(len(seen) // 4, 1)
        summary[f"divergence_{bits}_first"] = float(seen[:quarter].mean())
        summary[f"divergence_{bits}_last"] = float(seen[-quarter:].mean())
    for file in sorted(inputs["nested"].glob(SHARDS)):
        tensors = load_file(file)
        write_tensors(out / file.name, {name: tables.get(name, tensor) for name, tensor in tensors.items()})
    write_summary(out, summary)
    for part in parts:
        part.unlink()


def _tune(bits: int, config: TuneTablesConfig, inputs: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """Tuned tables by name, and the divergence of each step."""
    runtime = config.runtime
    model = load_model(inputs["model"], runtime.torch_dtype, runtime.device, runtime.trust_remote_code)
    cell = attach(model, inputs["nested"], bits)
    seen = tune_tables(
        model,
        cell,
        read_windows(inputs["texts"]),
        bits,
        steps=config.steps,
        rate=config.rate,
        batch_size=config.batch_size,
        progress=True,
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}
    tables = {
        f"{name}.centroids.{bits}": layer.nested.centroids[bits] for name, layer in layers.items() if layer.nested
    }
    return tables | {DIVERGENCE: torch.tensor(seen)}


TUNE_TABLES = Stage(
    "tune_tables",
    1,
    TuneTablesConfig,
    run_tune_tables,
    "steps of Adam over whole passes of the model, at every precision tuned",
)
