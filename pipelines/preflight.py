"""What must be there before the first stage: weights, data, encoder, packages, device, disk."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pipelines.plan import Cell, MissingSearchError, Planner
from pipelines.sources import device_type, encoder_input, task_input, text_input
from pmpd.artifacts import Node, Store
from pmpd.config import Config, ConfigError, GpuConfig, Metric, SchedulerKind, Solver, given_steps
from pmpd.models import resolve
from pmpd.stages import STAGES
from pmpd.stages.inputs import model_input
from pmpd.stages.timing import LATENCY

log = logging.getLogger(__name__)

BYTES_PER_WEIGHT = {".safetensors": 2.0, ".bin": 2.0, ".gguf": 0.55}
"""How large a weight is in its file, at least: half precision, or the 4.5 bits of a Q4 GGUF."""


class PreflightError(ConfigError):
    """Something that the plan needs is not there; the message says how to get it."""


def check_sources(config: Config, store: Store) -> None:
    """Refuse everything that is missing at once: device, packages, model, data and encoder.

    Raises:
        PreflightError: each thing that is not there, and the command or field that mends it.
    """
    digests = store.root / "digests.json"
    splits = [config.task.test_split]
    if config.scheduler.kind is SchedulerKind.static and given_steps(config) is None:
        assert config.task.validation_split is not None
        splits.append(config.task.validation_split)
    checks: list[Callable[[], object]] = [
        partial(_check_machine, config, store),
        lambda: model_input(resolve(config.model.path, config.model.revision), digests),
        partial(text_input, config, digests),
        *(partial(task_input, config, split, digests) for split in splits),
    ]
    if Metric.bertscore in config.task.metrics:
        checks.append(partial(encoder_input, config.budget.bertscore_encoder, digests))
    problems: dict[str, None] = {}  # a folder that is not there is missed by every set that it should hold
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems[str(error)] = None
    if len(problems) == 1:
        raise PreflightError(*problems)
    if problems:
        raise PreflightError(f"{len(problems)} things are missing\n  - " + "\n  - ".join(problems))


def _check_machine(config: Config, store: Store) -> None:
    if isinstance(config.hardware, GpuConfig):
        if torch.cuda.is_available():
            from pmpd.kernels.product import MIN_CAPABILITY

            if (capability := torch.cuda.get_device_capability()) < MIN_CAPABILITY:
                raise PreflightError(
                    f"hardware=gpu is not possible: the kernels need compute capability {MIN_CAPABILITY}, this GPU has "
                    f"{capability}; hardware=npu_4k estimates"
                )
        elif not any(found["runtime"]["device"] == "cuda" for found in store.configs(LATENCY.name)):
            raise PreflightError(
                "hardware=gpu is not possible: PyTorch sees no CUDA device and the store has no record of one; "
                "hardware=npu_4k estimates"
            )
    if device_type(config) == "cuda" and not torch.cuda.is_available():
        raise PreflightError("device=cuda is not possible: PyTorch sees no CUDA device here; device=cpu runs anywhere")
    if config.quantizer.solver is Solver.lloyd and importlib.util.find_spec("flash1dkmeans") is None:
        raise PreflightError("quantizer.solver=lloyd needs flash1dkmeans: pip install 'pmpd[lloyd]'")


def check_disk(planner: Planner) -> None:
    """Refuse a disk that cannot hold what the model's artifacts still need, judged by the size of its weight files.

    A hub model that is not downloaded yet has no size here, which is said.

    Raises:
        PreflightError: too little room below ``store``.
    """
    store = planner.store
    todo = {n.stage for n in planner.search.ancestors() if store.status(n) != "cached"}
    kind = planner.config.scheduler.kind
    if kind is SchedulerKind.dense_sparse:
        known = [cell.dense_sparse for cell in cells_of(planner, [kind])]
        if not all(node is not None and store.status(node) == "cached" for node in known) or not known:
            todo.add(kind.value)
    weights = [f for f in planner.source.files if f.suffix in BYTES_PER_WEIGHT]
    if not all(f.is_absolute() for f in weights):
        log.info("the size of %s is known after its download, so disk space is not checked", planner.source.path)
        return
    parameters = sum(f.stat().st_size / BYTES_PER_WEIGHT[f.suffix] for f in weights)
    nested = 1.25 * planner.config.quantizer.parent_bits / 8
    # Second moments are in x in float32 a layer: about 5 bytes a weight where layers are near square.
    bytes_each = {"weights": 2.0, "sensitivity": 2.0, "moments": 5.0}
    made = ("quantize", "quantize_joint", "refit_tables", "tune_tables", "dense_sparse")
    bytes_each |= dict.fromkeys(made, nested)
    needed_gib = parameters * sum(v for stage, v in bytes_each.items() if stage in todo) / 2**30 + 0.1
    free_gib = shutil.disk_usage(store.root).free / 2**30
    if needed_gib > free_gib:
        raise PreflightError(
            f"the plan writes about {needed_gib:.1f} GiB below store={store.root}, where {free_gib:.1f} GiB are free; "
            "free some space or give store=DIR on another disk"
        )


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


def cells_of(planner: Planner, kinds: Sequence[SchedulerKind]) -> list[Cell]:
    """The cells of ``kinds`` if their keys are known already, else none."""
    try:
        return [planner.cell(kind) for kind in kinds]
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


__all__ = ["PreflightError", "cells_of", "check_disk", "check_sources", "describe"]
