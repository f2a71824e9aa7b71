"""A run on Weights & Biases, or nowhere.

Our own store is the source of truth, so a tracker may fail and the run goes on: this is the one fallback
in the project, and it is loud. Knows nothing about stages beyond their names.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pmpd.files import write_json
from pmpd.tracking.ledger import Identity, ledger, remove_unsent, was_sent
from pmpd.version import code_version

log = logging.getLogger(__name__)


Value = float | int | str
MODES = ("offline", "online", "disabled")

INIT_TIMEOUT_S = 60.0
"""An online run that has not started by then (no network, wrong address) is given up."""
FINISH_TIMEOUT_S = 120.0
"""An upload that has not ended by then is given up; the data stay on disk for ``wandb sync``."""


_unreachable: list[str] = []
"""Why W&B could not be reached, once a run of this process has waited for it in vain: later ones do not wait."""


class Tracker(Protocol):
    """Where a run is mirrored. Every name is prefixed with its stage."""

    def metrics(self, stage: str, values: Mapping[str, Value]) -> None:
        """Numbers and short texts that describe a stage's result."""

    def curve(self, stage: str, name: str, rows: Sequence[Mapping[str, Value]]) -> None:
        """Lines over the first column of ``rows``."""

    def table(self, stage: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as they are; columns in order of appearance."""

    def lineage(self, stage: str, key: str, inputs: Mapping[str, str], path: str) -> None:
        """Which artifact the run is of or reads: its key, its inputs' keys, where it lies."""

    def figure(self, name: str, path: Path) -> None:
        """A picture."""

    def finish(self) -> None:
        """Ends the run; nothing may be sent after it."""


class NullTracker:
    """Sends nothing anywhere."""

    def metrics(self, stage: str, values: Mapping[str, Value]) -> None:
        pass

    def curve(self, stage: str, name: str, rows: Sequence[Mapping[str, Value]]) -> None:
        pass

    def table(self, stage: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def lineage(self, stage: str, key: str, inputs: Mapping[str, str], path: str) -> None:
        pass

    def figure(self, name: str, path: Path) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """One W&B run. Raises whatever W&B raises: :func:`open_tracker` is what makes it safe.

    An offline run needs neither key nor network and lies in ``dir``/wandb; ``wandb sync`` uploads it.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        entity: str | None,
        dir: str,
        config: Mapping[str, Any],
        group: str | None,
        name: str | None,
        tags: Sequence[str],
        job_type: str | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._identity = identity
        self._ledger = None if identity is None else ledger(dir, project, identity)
        if identity is not None:
            remove_unsent(Path(dir), identity)
        # W&B would quietly move to a temporary folder if it could not write here.
        folder = Path(dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # Tables wait for their upload in the data folder, in the user's home unless told otherwise; no setting exists.
        for variable, leaf in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ.setdefault(variable, str(folder / "wandb" / leaf))
        import wandb

        self._wandb = wandb
        wandb.setup(settings=wandb.Settings(silent=True))  # the log-in speaks before a run's settings hold
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=project,
            entity=entity,
            dir=str(folder),
            config={**config, "code_version": code_version()},
            group=group,
            name=name,
            tags=list(tags),
            job_type=job_type,
            id=None if identity is None else identity.run_id,
            # Offline, W&B ignores it with a warning; two offline runs of one id become one when they are synced.
            resume="allow" if identity is not None and mode == "online" else None,
            settings=wandb_settings(wandb),
        )
        self._step = 0
        self._lineage: dict[str, dict[str, Any]] = {}
        if mode == "online" and self._run.offline:
            log.warning("W&B has no login, so this run is offline: %s", self._run.dir)
        say_where(mode, Path(self._run.dir).parents[1])

    def _log(self, values: Mapping[str, Any]) -> None:
        # Numbered by us: a run that is told again repeats its steps, and W&B keeps the first telling of a step.
        self._run.log(dict(values), step=self._step)
        self._step += 1

    def metrics(self, stage: str, values: Mapping[str, Value]) -> None:
        self._log({f"{stage}/{name}": value for name, value in values.items()})

    def curve(self, stage: str, name: str, rows: Sequence[Mapping[str, Value]]) -> None:
        if not rows:
            return
        prefix = f"{stage}/{name}"
        x = f"{prefix}/{next(iter(rows[0]))}"
        self._run.define_metric(x, hidden=True)
        for column in list(rows[0])[1:]:
            self._run.define_metric(f"{prefix}/{column}", step_metric=x)
        for row in rows:
            self._log({f"{prefix}/{column}": value for column, value in row.items()})

    def table(self, stage: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(str(column)) for column in columns] for row in rows]
        table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self._log({f"{stage}/{name}": table})

    def figure(self, name: str, path: Path) -> None:
        self._log({name: self._wandb.Image(str(path))})

    def lineage(self, stage: str, key: str, inputs: Mapping[str, str], path: str) -> None:
        # In the config, because an offline run cannot use W&B's artifacts; "/" keeps one stage's artifacts apart.
        self._lineage[f"{stage}/{key}"] = {"inputs": dict(inputs), "path": path}
        self._run.config.update({"lineage": self._lineage}, allow_val_change=True)

    def finish(self) -> None:
        self._run.finish()
        if self._ledger is not None and self._identity is not None:
            said = {
                "content": self._identity.content,
                "folder": str(Path(self._run.dir).parent),
                "told_ns": time.time_ns(),
                "lineage": self._lineage,
                "linked": False,
            }
            write_json(self._ledger, said)


class _Guarded:
    """Passes calls on until one fails; then says so once and sends nothing more."""

    def __init__(self, open_inner: Callable[[], Tracker]) -> None:
        self._inner: Tracker = NullTracker()
        self._inner = self._attempt("start", open_inner) or self._inner

    def _attempt(self, action: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        # W&B's failures share no base class (ImportError, OSError, its own errors, its service's, a time-out),
        # and none of them may cost a run whose results are safe in the store.
        except Exception as error:
            self._inner = NullTracker()
            log.warning(
                "W&B failed at %s; the rest of this run is not tracked, its results in the store are safe: %s: %s",
                action,
                type(error).__name__,
                error,
            )
            return None

    def metrics(self, stage: str, values: Mapping[str, Value]) -> None:
        self._attempt(f"metrics of {stage}", lambda: self._inner.metrics(stage, values))

    def curve(self, stage: str, name: str, rows: Sequence[Mapping[str, Value]]) -> None:
        self._attempt(f"curve {stage}/{name}", lambda: self._inner.curve(stage, name, rows))

    def table(self, stage: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._attempt(f"table {stage}/{name}", lambda: self._inner.table(stage, name, rows))

    def lineage(self, stage: str, key: str, inputs: Mapping[str, str], path: str) -> None:
        self._attempt(f"lineage of {stage}", lambda: self._inner.lineage(stage, key, inputs, path))

    def figure(self, name: str, path: Path) -> None:
        self._attempt(f"figure {name}", lambda: self._inner.figure(name, path))

    def finish(self) -> None:
        self._attempt("finish", self._inner.finish)
        self._inner = NullTracker()


def open_tracker(
    mode: str,
    *,
    project: str,
    entity: str | None = None,
    dir: str,
    config: Mapping[str, Any],
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    job_type: str | None = None,
    identity: Identity | None = None,
) -> Tracker:
    """A tracker that never raises: ``offline`` and ``online`` are W&B's, ``disabled`` sends nothing.

    ``config`` is plain nested data; the code's version is added to it as ``code_version``. An online run that cannot
    start, because W&B is not reachable, is kept offline, and so is every later one of the process. One whose
    ``identity`` was sent before is not sent again.

    Raises:
        ValueError: another ``mode``.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: one of {', '.join(MODES)}")
    if mode == "disabled" or (identity is not None and was_sent(dir, project, identity)):
        return NullTracker()

    def start(how: str) -> Tracker:
        return WandbTracker(how, project, entity, dir, config, group, name, tags, job_type, identity)

    def open_inner() -> Tracker:
        if mode == "online" and _unreachable:
            return start("offline")
        try:
            return start(mode)
        except Exception as error:  # as in _Guarded._attempt: W&B's failures share no base class
            if mode != "online":
                raise
            tracker = start("offline")
            log.warning(
                "W&B is not reachable (%s: %s); this run and later ones are kept in %s, `wandb sync` sends them",
                type(error).__name__,
                error,
                dir,
            )
            _unreachable.append(str(error))
            return tracker

    return _Guarded(open_inner)


def in_tuning() -> bool:
    """Whether a W&B agent started this process: the one run that it asks for is the cell's."""
    return "WANDB_SWEEP_ID" in os.environ


def wandb_settings(wandb: Any) -> Any:
    """Nothing printed, no diffs, no system samples, no waiting for ever."""
    wanted = {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "reinit": "create_new",
        "init_timeout": INIT_TIMEOUT_S,
        "login_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
    }
    # Older releases lack some of them (finish_timeout), and an unknown one is an error.
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


@functools.cache
def say_where(mode: str, folder: Path) -> None:
    """Once for all runs of a process: a sweep has one for each stage and cell."""
    log.info("W&B %s runs are in %s; `wandb sync` uploads what is not there yet", mode, folder)
