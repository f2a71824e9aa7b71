"""What a job is, and what an engine that runs jobs does. Knows no engine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numba
import torch

from pmpd.artifacts import Node, Store
from pmpd.config import NeedsConfig
from pmpd.locks import Patience
from pmpd.stages import execute


class State(Enum):
    """How a job that was submitted is; ``stuck``: it waits, for what will not come."""

    waiting = "waiting"
    running = "running"
    ended = "ended"
    stuck = "stuck"


class RefusedError(RuntimeError):
    """The engine took no job this time: a limit is reached, or its controller is away."""


class ImpossibleError(RuntimeError):
    """The engine will not take this job however often it is asked."""


class Handle(Protocol):
    """A job that was started."""

    def state(self) -> State: ...

    def said(self) -> str:
        """Where its words are, what ended it, or what it waits for: of a job that left no artifact and no error."""

    def cancel(self) -> None: ...


class Engine(Protocol):
    """Starts jobs."""

    def has_room(self, needs: NeedsConfig) -> bool:
        """Whether a job may be submitted now; an engine that queues always has."""

    def submit(self, job: Build, needs: NeedsConfig) -> Handle:
        """Starts ``job``.

        Raises:
            RefusedError: not now; it may be taken later.
            ImpossibleError: nor will it be.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class Build:
    """What a job does: one artifact, and what is missing before it.

    Attributes:
        folder: the working directory that relative paths are meant from.
        threads: None: as many as the process has.
    """

    node: Node
    store: str
    folder: str
    threads: int | None
    patience: Patience | None = None

    @property
    def name(self) -> str:
        return f"{self.node.stage}-{self.node.key}"

    def __call__(self) -> None:
        os.chdir(self.folder)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        logging.getLogger("numba").setLevel(logging.WARNING)
        if self.threads is not None:
            set_threads(self.threads)
        Store(Path(self.store), self.patience).materialize(self.node, execute)

    def checkpoint(self) -> Any:
        """Submitit's hook before a requeue: the same again, since the store keeps the parts."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def set_threads(threads: int) -> None:
    """For torch and numba alike: numba's OpenMP layer sets torch's number to its own when it first runs."""
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))
