"""What must be there before the first stage: packages, device, disk. Weights and data are found while planning."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

import torch

from pipelines.plan import Cell, MissingSearchError, Planner, device_type
from pmpd.artifacts import Node
from pmpd.config import Config, ConfigError, Metric, Solver
from pmpd.metrics import encoder_folder
from pmpd.models import architecture
from pmpd.stages import STAGES


class PreflightError(ConfigError):
    """Something that the plan needs is not there; the message says how to get it."""


def check_machine(config: Config) -> None:
    """Refuse a missing package, device or encoder.

    Raises:
        PreflightError, EncoderError: what is missing, and the command or field that mends it.
    """
    if device_type(config) == "cuda" and not torch.cuda.is_available():
        raise PreflightError("device=cuda is not possible: PyTorch sees no CUDA device here; device=cpu runs anywhere")
    if config.quantizer.solver is Solver.lloyd and importlib.util.find_spec("flash1dkmeans") is None:
        raise PreflightError("quantizer.solver=lloyd needs flash1dkmeans: pip install 'pmpd[lloyd]'")
    if Metric.bertscore in config.task.metrics:
        encoder_folder(config.budget.bertscore_encoder)


def check_disk(planner: Planner) -> float:
    """GiB that the model's artifacts still need; refuses a disk that cannot hold them.

    Raises:
        PreflightError: too little room below ``store``.
    """
    store = planner.store
    missing = [n for n in planner.search.ancestors() if store.status(n) != "cached"]
    stages = {n.stage for n in missing}
    if not stages & {"sensitivity", "quantize"} or "weights" in stages:
        parameters = 0
    else:
        shape = architecture(planner.store.materialize(planner.model, _refuse))
        parameters = shape.num_layers * shape.block_parameters
    bytes_each = 2.0 * ("sensitivity" in stages) + 1.25 * planner.config.quantizer.parent_bits / 8 * (
        "quantize" in stages
    )
    needed_gib = parameters * bytes_each / 2**30 + 0.1
    free_gib = shutil.disk_usage(store.root).free / 2**30
    if needed_gib > free_gib:
        raise PreflightError(
            f"the plan writes about {needed_gib:.1f} GiB below store={store.root}, where {free_gib:.1f} GiB are free; "
            "free some space or give store=DIR on another disk"
        )
    return needed_gib


def describe(planner: Planner, cells: Sequence[Cell]) -> str:
    """The plan as a table: each stage with its key, and whether it is cached or to do."""
    targets = [t for cell in cells for t in cell.targets] or [planner.search]
    nodes: dict[str, Node] = {}
    for target in targets:
        nodes |= {n.key: n for n in target.ancestors()}
    lines = [f"{'stage':<14} {'key':<16} {'state':<8} cost"]
    for node in nodes.values():
        state = planner.store.status(node)
        cost = "" if state == "cached" else STAGES[node.stage].cost + _amount(node)
        lines.append(f"{node.stage:<14} {node.key:<16} {state:<8} {cost}".rstrip())
    if not cells:
        lines.append("(what follows is keyed when the search has found model.high_bits)")
    return "\n".join(lines)


def cells_of(planner: Planner, kinds: Sequence[object]) -> list[Cell]:
    """The cells of ``kinds`` if their keys are known already, else none."""
    try:
        return [planner.cell(kind) for kind in kinds]  # type: ignore[arg-type]
    except MissingSearchError:
        return []


def _amount(node: Node) -> str:
    config = node.config
    match node.stage:
        case "sensitivity":
            texts = node.inputs["texts"]
            assert isinstance(texts, Node)
            return f" ({texts.config['count']} x {texts.config['window_tokens']} tokens)"
        case "rollouts":
            prompts = node.inputs["prompts"]
            assert isinstance(prompts, Node)
            count = prompts.config.get("limit") or prompts.config.get("count") or "all"
            return f" ({count} prompts x {len(config['schedules'])} schedules x {config['max_new_tokens']} tokens)"
    return ""


def _refuse(node: Node, inputs: object, out: object) -> None:
    raise AssertionError(f"preflight runs no stage, least of all {node.stage}")


__all__ = ["PreflightError", "cells_of", "check_disk", "check_machine", "describe"]
