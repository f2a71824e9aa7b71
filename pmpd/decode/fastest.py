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
from pmpd.decode.llama import fuse, not_fusable
from pmpd.decode.llama_step import LlamaStep, no_step
from pmpd.quant import PrecisionCell

log = logging.getLogger(__name__)


def fastest(model: Any, cell: PrecisionCell | None) -> tuple[nn.Module, PrecisionCell | None, str]:
    """A model for the decode loop, the cell that its layers follow, and in words how its steps are taken.

    ``model`` is used up where it is fused.
    """
    parameter = next(model.parameters())
    if not parameter.is_cuda:
        return model, cell, "the model's own forward on a CPU, on dequantised weights: bits save no time"
    with torch.cuda.device(parameter.device):
        reason = not_fusable(model.config) or no_step(model.config, parameter.dtype)
        if reason is None:
            fused, fused_cell = fuse(model, cell)
            return GraphedModel(fused, fused_cell, LlamaStep(fused)), fused_cell, "fused kernels under CUDA graphs"
        log.info("no fused kernels for this model: %s", reason)
        reason = not_capturable(model.config)
        if reason is None:
            return GraphedModel(model, cell, CapturedStep(model)), cell, "the model's own code under CUDA graphs"
        log.warning("no graphs for this model, so the CPU sets the pace: %s", reason)
        return model, cell, "the model's own forward, launched by the CPU"
