"""The store: what a stage leaves, under the hash of everything that determines it.

A :class:`Store` keeps one directory for the key of a recipe (``pmpd.recipe``), published whole or not at all. This
module knows nothing about what stages do.

Layout of a store::

    store.json                      its format
    <stage>/<key>/artifact.json     recipe, lineage and digests, beside the stage's files
    <stage>/<key>.<n>.work/         parts of a stage that is running or was killed
    <stage>/<key>.<n>.lock          the n-th turn at building it (``pmpd.locks``)
    <stage>/<key>.<n>.damaged/      set aside, being removed
    <stage>/<key>.error.json        what the last attempt failed with
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pmpd import __version__
from pmpd.files import (
    atomic,
    digest_file,
    digest_files,
    disk_is_full,
    fsync,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_tensors,
)
from pmpd.locks import Patience, hold, is_latest
from pmpd.recipe import Input, Node, Root, recipe_key

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "artifact.json"


class StoreError(RuntimeError):
    """The store cannot be used as it is; the message says what to do."""


class DamagedArtifactError(StoreError):
    """A published file is missing or differs from its recorded digest."""


Execute = Callable[[Node, Mapping[str, Path], Path], None]
"""Runs a node's stage: ``execute(node, input paths, output directory)``."""


class Store:
    """Artifacts in a directory, safe against kills, damage and several processes.

    Raises:
        StoreError: the directory cannot be made, or holds a store of another format or something else.
    """

    def __init__(self, root: Path, patience: Patience | None = None) -> None:
        """
        Args:
            patience: how long a silent holder of a lock is waited for; the default suits every real use.
        """
        self.root = root
        self.patience = patience
        self._verified: set[str] = set()
        marker = root / "store.json"
        try:
            root.mkdir(parents=True, exist_ok=True)
            strangers = any(p.suffix not in (".lock", ".tmp") for p in root.iterdir())
            if strangers and not marker.exists():
                raise StoreError(f"{root} is not empty and is no store (it has no store.json); give another store=DIR")
            if not marker.exists():
                write_json(marker, {"format": FORMAT})  # two first runs may start together: whole, the same from both
        except OSError as error:
            raise StoreError(f"{root} cannot be a store ({error}); give another store=DIR") from error
        try:
            found = dict(read_json(marker)).get("format")
        except ValueError as error:
            raise StoreError(f"{marker} is damaged ({error}); give another store=DIR") from error
        if found != FORMAT:
            raise StoreError(
                f"the store {root} has format {found}, this version ({__version__}) writes format {FORMAT}; "
                "use another folder (store=DIR), or the version that wrote it"
            )

    def path(self, node: Node) -> Path:
        return self.root / node.stage / node.key

    def parts(self, node: Node) -> Path | None:
        """What a stage that is running or was killed has written so far."""
        found = self.root.glob(f"{node.stage}/{node.key}.*.work")
        return max(found, key=lambda p: int(p.suffixes[-2][1:]), default=None)

    def status(self, node: Node) -> str:
        """``cached``, ``resumes`` (a killed stage left parts) or ``to do``; reads no artifact."""
        if (self.path(node) / MANIFEST).exists():
            return "cached"
        return "resumes" if self.parts(node) is not None else "to do"

    def failure(self, node: Node) -> str | None:
        """What the last attempt to build ``node`` failed with, if it is not there."""
        try:
            return str(read_json(self._error(node))["error"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def configs(self, stage: str) -> Iterator[dict[str, Any]]:
        """The configuration of every finished artifact of ``stage``, in the order of their keys."""
        for manifest in sorted((self.root / stage).glob(f"*/{MANIFEST}")):
            yield dict(read_json(manifest)["config"])

    def verify(self, node: Node, suffix: str = "") -> Path:
        """The artifact's directory, its digests checked (once a process).

        Args:
            suffix: only of files whose name ends so: who reads a summary need not read the weights beside it.

        Raises:
            DamagedArtifactError: a file is missing or changed.
            FileNotFoundError: no such artifact.
        """
        path = self.path(node)
        if node.key in self._verified or node.key + suffix in self._verified:
            return path
        if not (path / MANIFEST).exists():
            raise FileNotFoundError(f"{node.stage} {node.key} is not in the store")
        try:
            manifest = read_json(path / MANIFEST)
            files = dict(manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifactError(f"{path / MANIFEST} is damaged ({error})") from error
        for name, expected in files.items():
            if not name.endswith(suffix):
                continue
            if not (path / name).is_file():
                raise DamagedArtifactError(f"{path / name} is missing")
            if digest_file(path / name) != expected["sha256"]:
                raise DamagedArtifactError(f"{path / name} is not what was written (sha256 differs)")
        self._verified.add(node.key + suffix)
        return path

    def materialize(self, item: Input, execute: Execute) -> Path:
        """The path of ``item``, built first where it or an ancestor is missing or damaged.

        Raises:
            StoreError: the disk is full, or another process took this one for dead; parts are kept for the next run.
        """
        if isinstance(item, Root):
            return item.locate()
        while True:
            try:
                return self.verify(item)
            except FileNotFoundError:
                damaged = None
            except DamagedArtifactError as error:
                log.warning("damaged artifact, built again: %s", error)
                damaged = self._stamp(item)
            try:
                self.path(item).parent.mkdir(parents=True, exist_ok=True)
                self._take_turn(item, execute, damaged)
            except (OSError, SafetensorError) as error:
                if not disk_is_full(error):
                    raise
                raise StoreError(
                    f"the disk of {self.root} is full while {item.stage} ({item.key}) was being written; "
                    "free some space and run the same command again: what was finished is kept"
                ) from error

    def _take_turn(self, node: Node, execute: Execute, damaged: tuple[int, int] | None) -> None:
        """Build ``node`` unless another process does it first; ``damaged`` is the stamp of what must be replaced."""

        def settled() -> bool:
            return self._stamp(node) not in (None, damaged)

        path = self.path(node)
        with hold(path.parent, node.key, settled, self.patience) as turn:
            if turn is None or settled():
                return
            if path.exists():  # damaged, or without a manifest
                aside = path.with_name(f"{node.key}.{turn}.damaged")
                path.rename(aside)  # at once out of everybody's sight: a removal takes time, and may be killed
                shutil.rmtree(aside)
            self.forget_failure(node)
            try:
                inputs = {name: self.materialize(parent, execute) for name, parent in node.inputs.items()}
                if not is_latest(path.parent, node.key, turn):
                    log.warning("%s was taken over while its inputs were waited for", node.key)
                    return  # the caller looks again, and waits for who has it now
                work = self._claim(node, turn)
            except Exception as error:
                if is_latest(path.parent, node.key, turn):
                    self.note_failure(node, f"{type(error).__name__}: {error}")
                raise
            claimed, started = work.stat().st_ino, time.monotonic()
            try:
                execute(node, inputs, work)
                self._publish(node, work, claimed, time.monotonic() - started)
            except Exception as error:
                if not _is(work, claimed):
                    raise StoreError(
                        f"{work} was taken over by another process, which took this one for dead (its host was "
                        "suspended, or could not reach the store); the same command finds what that one makes of it"
                    ) from error
                self.note_failure(node, f"{type(error).__name__}: {error}")
                raise

    def _claim(self, node: Node, turn: int) -> Path:
        """This turn's directory, with what earlier turns left; a turn that was given up can write there no more."""
        work = self.root / node.stage / f"{node.key}.{turn}.work"
        found = self.parts(node)
        if found is not None:
            found.rename(work)
        else:
            work.mkdir()
        for leftover in [*work.rglob("*.tmp"), *work.rglob(".tmp*")]:  # ours, and safetensors' own
            leftover.unlink(missing_ok=True)
        return work

    def _stamp(self, node: Node) -> tuple[int, int] | None:
        """Tells one artifact from another that took its place; None where there is none."""
        try:
            found = (self.path(node) / MANIFEST).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _error(self, node: Node) -> Path:
        return self.root / node.stage / f"{node.key}.error.json"

    def note_failure(self, node: Node, words: str) -> None:
        """Say beside an artifact that is not there why it is not, for reports; the next attempt forgets it."""
        try:
            write_json(self._error(node), {"error": words, "host": socket.gethostname(), "pid": os.getpid()})
        except OSError as error:  # most often the full disk that it would have told of
            log.warning("the failure of %s %s could not be noted (%s): %s", node.stage, node.key, error, words)

    def forget_failure(self, node: Node) -> None:
        """Before another attempt, so that what is said afterwards is of that one."""
        self._error(node).unlink(missing_ok=True)

    def _publish(self, node: Node, work: Path, claimed: int, seconds: float) -> None:
        """Make the turn's directory, whose inode was ``claimed``, the artifact.

        Raises:
            FileNotFoundError: it was taken over.
        """
        names = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file() and p.name != MANIFEST)
        manifest = {
            "stage": node.stage,
            "version": node.version,
            "key": node.key,
            "config": dict(node.config),
            "inputs": {name: parent.key for name, parent in node.inputs.items()},
            "sources": {name: parent.name for name, parent in node.inputs.items() if isinstance(parent, Root)},
            "files": {
                name: {"sha256": digest_file(work / name), "bytes": (work / name).stat().st_size} for name in names
            },
            "written_by": __version__,
            "machine": platform.machine(),
            "duration_s": round(seconds, 3),
        }
        write_json(work / MANIFEST, manifest)
        for name in names:
            fsync(work / name)
        for folder in {work, *((work / n).parent for n in names)}:
            fsync(folder)
        if not _is(work, claimed):
            raise FileNotFoundError(work)
        work.rename(self.path(node))
        fsync(self.path(node).parent)
        self._verified.add(node.key)


def _is(folder: Path, inode: int) -> bool:
    """Whether ``folder`` is still the one of that inode: a late write may have made a new one of the old name."""
    try:
        return folder.stat().st_ino == inode
    except FileNotFoundError:
        return False


__all__ = [
    "MANIFEST",
    "DamagedArtifactError",
    "Execute",
    "Input",
    "Node",
    "Root",
    "Store",
    "StoreError",
    "atomic",
    "digest_file",
    "digest_files",
    "disk_is_full",
    "read_json",
    "read_jsonl",
    "recipe_key",
    "write_json",
    "write_jsonl",
    "write_tensors",
]
