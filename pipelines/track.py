"""What of a sweep goes to W&B: a run for each stage that was built, for each cell, and for the sweep itself.

All are in the sweep's group, with the stage (``cell``, ``sweep``) as job type. Each has an identity made of keys, so
that a resumed sweep says nothing twice, and names its inputs by key; ``pipelines/link.py`` makes links of them later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.plan import Cell
from pmpd.artifacts import Input, Node, Store
from pmpd.config import Config
from pmpd.report import CellRecord
from pmpd.stages import SUMMARY, read_summary
from pmpd.tracking import Identity, Tracker, in_tuning, open_tracker, was_sent


class Tracking:
    """Tells W&B of one sweep, or of one run on its own."""

    def __init__(self, config: Config, group: str, store: Store) -> None:
        self.config = config
        self.group = group
        self.store = store
        self._told: set[str] = set()

    def stages(self, node: Node) -> None:
        """A run for ``node`` and each of its ancestors that the store holds and W&B does not know."""
        if in_tuning():  # the agent's one run is the cell's
            return
        for one in node.ancestors():
            if one.key not in self._told and (self.store.path(one) / SUMMARY).exists():
                self._told.add(one.key)
                self._stage(one)

    def _stage(self, node: Node) -> None:
        identity = Identity(f"{node.stage}-{node.key}", node.key)
        if self._sent(identity):
            return
        label = _label(node)
        tracker = self._open(f"{label}-{node.key}", node.stage, identity, {"recipe": dict(node.config)}, [])
        path = self.store.path(node)
        summary = read_summary(path)
        self._lineage(tracker, node)
        tracker.metrics(label, {k: v for k, v in summary["metrics"].items() if v is not None})
        for name, rows in summary["curves"].items():
            tracker.curve(label, name, rows)
        for name, rows in summary["tables"].items():
            tracker.table(label, name, rows)
        tracker.finish()

    def cell(self, cell: Cell, record: CellRecord) -> None:
        """A run for a cell: its numbers, and the artifacts that they are from."""
        read = [cell.evaluation, cell.gain]
        digest = hashlib.sha256("".join(n.key for n in read).encode()).hexdigest()[:16]
        identity = Identity(f"cell-{digest}", digest)
        if self._sent(identity) and not in_tuning():
            return
        config, names = cell.config, (record.model, record.task, record.scheduler)
        tracker = self._open("-".join(names), "cell", None if in_tuning() else identity, plain(config), names, config)
        for node in read:
            self._lineage(tracker, node)
        numbers = {r["quantity"]: r["value"] for r in record.results if _is_number(r["value"])}
        for chosen in (cell.fit, cell.training):  # what a schedule was chosen by; never the test split
            if chosen is not None:
                told = read_summary(self.store.path(chosen))["metrics"]
                tracker.metrics(chosen.stage, {k: v for k, v in told.items() if v is not None})
        tracker.metrics("result", {quantity.replace(" ", "_"): value for quantity, value in numbers.items()})
        tracker.finish()

    def sweep(self, name: str, out: Path, missing: Sequence[Any]) -> None:
        """The sweep's own run: its table with what is missing, and its figures, as ``out`` holds them."""
        table = out / "results.csv"
        if in_tuning() or not table.exists():
            return
        words = [f"{cell.command}: {cell.reason}" for cell in missing]
        content = hashlib.sha256(table.read_bytes() + "\n".join(words).encode()).hexdigest()[:16]
        identity = Identity(f"sweep-{hashlib.sha256(self.group.encode()).hexdigest()[:16]}", content)
        if self._sent(identity):
            return
        tracker = self._open(name, "sweep", identity, {}, [])
        frame = pd.read_csv(table)
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        tracker.table("sweep", "results", [{str(k): v for k, v in row.items()} for row in rows])
        for file in sorted(out.glob("table_*.csv")):  # as people read them
            tracker.table("sweep", file.stem, pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records"))
        tracker.table("sweep", "missing", [{"command": c.command, "reason": c.reason} for c in missing])
        tracker.metrics("sweep", {"numbers": len(rows), "missing_cells": len(missing)})
        for figure in sorted(out.glob("*.png")):
            tracker.figure(f"sweep/{figure.stem}", figure)
        tracker.finish()

    def _lineage(self, tracker: Tracker, node: Node) -> None:
        inputs = {name: _name(item) for name, item in node.inputs.items()}
        tracker.lineage(node.stage, node.key, inputs, str(self.store.path(node)))

    def _sent(self, identity: Identity) -> bool:
        tracking = self.config.tracking
        return was_sent(tracking.dir, tracking.project, identity)

    def _open(
        self,
        name: str,
        job_type: str,
        identity: Identity | None,
        values: dict[str, Any],
        tags: Iterable[str],
        config: Config | None = None,
    ) -> Tracker:
        tracking = (config or self.config).tracking
        return open_tracker(
            tracking.mode.value,
            project=tracking.project,
            entity=tracking.entity,
            dir=tracking.dir,
            config=values,
            group=self.group,
            name=name,
            tags=list(tags),
            job_type=job_type,
            identity=identity,
        )


def group_of(run_name: str, overrides: Sequence[str]) -> str:
    """A sweep's group: an experiment's name; for a grid given by hand its own, the same whenever it is given again."""
    if any(o.startswith("experiment=") for o in overrides):
        return run_name
    return f"{run_name}-{hashlib.sha256(' '.join(sorted(overrides)).encode()).hexdigest()[:6]}"


def plain(value: Any) -> Any:
    """Configuration as JSON-able values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _label(node: Node) -> str:
    """The stage, with the scheduler where a sweep has one of each: ``evaluate/static``."""
    evaluation = node.inputs.get("evaluation", node)
    scheduler = evaluation.config.get("scheduler") if isinstance(evaluation, Node) else None
    return f"{node.stage}/{scheduler}" if scheduler else node.stage


def _name(item: Input) -> str:
    """``stage/key``, or ``source/key`` for what the pipeline did not make."""
    return f"{item.stage}/{item.key}" if isinstance(item, Node) else f"source/{item.key}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
