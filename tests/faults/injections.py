"""What can go wrong in a stage, done for real inside the process that runs it. Knows the store, not the sweep.

Faults strike at the n-th look of the stage at the filesystem, counted by Python's audit events (open, rename, remove,
make, touch) from the moment the stage begins until its artifact is published: so they fall inside writes, between
parts, in the middle of publishing, wherever a stage touches the disk.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmpd.artifacts import Node, Store
from pmpd.stages import execute

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.utime", "os.rmdir", "os.listdir", "os.scandir"}
WRITING = {"open", "os.rename", "os.mkdir"}


class StageError(ValueError):
    """What a stage that cannot do its work raises here."""


class Strike:
    """An audit hook that is asleep until the artifact that it is for is being made.

    Attributes:
        at: at which event it strikes; None only counts.
        counts: events that each artifact's making had, by key: all, and those that write.
        struck: whether it did, for faults that leave the process alive.
    """

    def __init__(self, kind: str, store: Store, key: str = "", at: int | None = None) -> None:
        self.kind, self.store, self.key, self.at = kind, store, key, at
        self.node: Node | None = None
        self.published = False
        self.counts: dict[str, list[int]] = {}
        self.struck = False
        sys.addaudithook(self._hook)

    def execute(self, node: Node, inputs: Mapping[str, Path], work: Path) -> None:
        """Run the stage of ``node``, awake if it is the one to strike, or all are counted."""
        self.node = node if self.at is None or node.key == self.key else None
        self.published = False
        if self.kind == "stage_error" and self.node is not None:
            (work / "begun.json.tmp").write_text('{"half')
            self.struck = True
            raise StageError(f"injected in {node.stage}")
        execute(node, inputs, work)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.node is None or event not in EVENTS:
            return
        if self.published:  # what follows is no longer this artifact's
            self.node = None
            return
        self.published = event == "os.rename" and str(arguments[1]) == str(self.store.path(self.node))
        writes = self._writes(event, arguments)
        count = self.counts.setdefault(self.node.key, [0, 0])
        count[0] += 1
        count[1] += writes
        if self.at is None or (self.kind == "disk_full" and not writes):
            return
        if count[1 if self.kind == "disk_full" else 0] <= self.at:
            return
        if self.kind in ("kill", "holder_gone"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "requeue":
            os.kill(os.getpid(), signal.SIGTERM)  # as Slurm ends a job that it will start again
        if self.kind == "disk_full":  # and stays full for as long as this artifact is being made
            self.struck = True
            self._half_write(event, arguments)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _writes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event not in WRITING or str(self.store.root) not in str(arguments[0]):
            return False
        if event != "open":
            return True
        mode, flags = arguments[1], arguments[2]
        return bool(set(str(mode)) & set("wax+")) or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))

    def _half_write(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Leave what a full disk leaves: the first bytes of the file."""
        node, self.node = self.node, None
        if event == "open" and str(arguments[0]).endswith(".tmp"):
            Path(arguments[0]).write_bytes(b'{"half')
        self.node = node


def truncate(store: Store, node: Node, share: float, which: float) -> Path:
    """Cut one file of a published artifact to ``share`` of its bytes."""
    files = sorted(p for p in store.path(node).rglob("*") if p.is_file() and p.stat().st_size > 0)
    file = files[int(which * len(files)) % len(files)]
    os.truncate(file, int(share * file.stat().st_size))
    return file
