"""The fastest way to take a model's decode steps on the device that it is on.

On a GPU: fused kernels under graphs for the Llama family, graphs of the model's own code for others. On a CPU the
model as it is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from pmpd.decode.captured import CapturedStep, not_capturable
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama import FusedLlama, fuse, not_fusable
from pmpd.decode.llama_step import LlamaStep, no_step
from pmpd.quant import PrecisionCell

log = logging.getLogger(__name__)

CPU_FORWARD = "the model's own forward, on dequantised weights: bits save no time"
FUSED_GRAPHS = "fused kernels under CUDA graphs"


def graphed(model: FusedLlama, cell: PrecisionCell | None) -> GraphedModel:
    """A fused model, on a GPU already, whose decode steps are kernels of our own under CUDA graphs."""
    return GraphedModel(model, cell, LlamaStep(model))


def fastest(
    model: Any, cell: PrecisionCell | None, device: torch.device | str
) -> tuple[nn.Module, PrecisionCell | None, str]:
    """A model on ``device`` for the decode loop, the cell that its layers follow, and in words how steps are taken.

    ``model`` is on the CPU and is used up.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return nn.Module.to(model, device), cell, CPU_FORWARD
    reason = not_fusable(model.config) or no_step(model.config, next(model.parameters()).dtype)
    if cell is not None and any(layer.has_outliers for layer in cell.layers):
        reason = "its layers have outliers, which the kernels do not add"
    if reason is None:
        model, cell = fuse(model, cell)  # before it moves: packed for the device, weights can no longer be joined
    else:
        log.info("no fused kernels for this model: %s", reason)
    nn.Module.to(model, device)
    weights = ""
    if cell is not None:
        cell.prepare(cell.bits)
        if any(layer.packed is None for layer in cell.layers):
            weights = ", on dequantised weights: bits save no time"
    with torch.cuda.device(device):
        if reason is None:
            return graphed(model, cell), cell, FUSED_GRAPHS
        reason = not_capturable(model.config)
        if reason is None:
            return (
                GraphedModel(model, cell, CapturedStep(model)),
                cell,
                f"the model's own code under CUDA graphs{weights}",
            )
    log.warning("no graphs for this model, so the CPU sets the pace: %s", reason)
    return model, cell, f"the model's own forward, launched by the CPU{weights}"
