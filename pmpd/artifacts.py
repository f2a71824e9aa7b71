"""The store: what a stage leaves, under the hash of everything that determines it.

A :class:`Node` is a recipe (stage, version, configuration, input recipes); its key is known without
running anything. A :class:`Store` keeps one directory a key, published whole or not at all. This
module knows nothing about what stages do.

Layout of a store::

    store.json                      its format
    <stage>/<key>/artifact.json     recipe, lineage and digests, beside the stage's files
    <stage>/<key>.work/             parts of a stage that is running or was killed
    <stage>/<key>.lock              held by the process that builds it
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pmpd import __version__

log = logging.getLogger(__name__)

FORMAT = 1
KEY_LENGTH = 16
MANIFEST = "artifact.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(RuntimeError):
    """The store cannot be used as it is; the message says what to do."""


class DamagedArtifactError(StoreError):
    """A published file is missing or differs from its recorded digest."""


def recipe_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The one key function: sha256 of the recipe as canonical JSON, shortened to 16 hex digits."""
    recipe = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, eq=False)
class Root:
    """An input that the pipeline did not make, keyed by its content.

    Attributes:
        name: for people, e.g. a file's or a hub model's name.
        key: digest of the content, or a hub commit.
        locate: gives its path; may download.
    """

    name: str
    key: str
    locate: Callable[[], Path]


@dataclass(frozen=True, eq=False)
class Node:
    """A stage applied to a configuration and inputs: an artifact's recipe."""

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        return recipe_key(self.stage, self.version, self.config, {n: i.key for n, i in self.inputs.items()})

    def ancestors(self) -> list[Node]:
        """This node after every node that it needs, each once, in an order that can be run."""
        seen: dict[str, Node] = {}

        def visit(node: Input) -> None:
            if isinstance(node, Node) and node.key not in seen:
                for parent in node.inputs.values():
                    visit(parent)
                seen[node.key] = node

        visit(self)
        return list(seen.values())


Input = Node | Root

Execute = Callable[[Node, Mapping[str, Path], Path], None]
"""Runs a node's stage: ``execute(node, input paths, output directory)``."""


class Store:
    """Artifacts in a directory, safe against kills, damage and several processes.

    Raises:
        StoreError: the directory holds a store of another format, or something else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        marker, lock = root / "store.json", root / "store.lock"
        strangers = root.exists() and any(p.suffix not in (".lock", ".tmp") for p in root.iterdir())
        if strangers and not marker.exists():
            raise StoreError(f"{root} is not empty and is no store (it has no store.json); give another store=DIR")
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(lock)):  # two first runs may start together
            if not marker.exists():
                write_json(marker, {"format": FORMAT})
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

    def work(self, node: Node) -> Path:
        return self.root / node.stage / f"{node.key}.work"

    def status(self, node: Node) -> str:
        """``cached``, ``resumes`` (a killed stage left parts) or ``to do``; reads no artifact."""
        if (self.path(node) / MANIFEST).exists():
            return "cached"
        return "resumes" if self.work(node).exists() else "to do"

    def configs(self, stage: str) -> Iterator[dict[str, Any]]:
        """The configuration of every finished artifact of ``stage``, in the order of their keys."""
        for manifest in sorted((self.root / stage).glob(f"*/{MANIFEST}")):
            yield dict(read_json(manifest)["config"])

    def verify(self, node: Node) -> Path:
        """The artifact's directory, its digests checked (once a process).

        Raises:
            DamagedArtifactError: a file is missing or changed.
            FileNotFoundError: no such artifact.
        """
        path = self.path(node)
        if node.key in self._verified:
            return path
        if not (path / MANIFEST).exists():
            raise FileNotFoundError(path)
        try:
            manifest = read_json(path / MANIFEST)
            files = dict(manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifactError(f"{path / MANIFEST} is damaged ({error})") from error
        for name, expected in files.items():
            if not (path / name).is_file():
                raise DamagedArtifactError(f"{path / name} is missing")
            if digest_file(path / name) != expected["sha256"]:
                raise DamagedArtifactError(f"{path / name} is not what was written (sha256 differs)")
        self._verified.add(node.key)
        return path

    def materialize(self, item: Input, execute: Execute) -> Path:
        """The path of ``item``, built first where it or an ancestor is missing or damaged.

        Raises:
            StoreError: the disk is full; parts are kept, and the next run resumes.
        """
        if isinstance(item, Root):
            return item.locate()
        path = self.path(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(item):
            try:
                return self.verify(item)
            except FileNotFoundError:
                pass
            except DamagedArtifactError as error:
                log.warning("damaged artifact, built again: %s", error)
            if path.exists():  # damaged, or a removal like this one that was killed halfway
                shutil.rmtree(path)
            inputs = {name: self.materialize(parent, execute) for name, parent in item.inputs.items()}
            work = self.work(item)
            try:
                work.mkdir(exist_ok=True)
                for leftover in [*work.rglob("*.tmp"), *work.rglob(".tmp*")]:  # ours, and safetensors' own
                    leftover.unlink()
                started = time.monotonic()
                execute(item, inputs, work)
                self._publish(item, work, time.monotonic() - started)
            except (OSError, SafetensorError) as error:
                if not disk_is_full(error):
                    raise
                raise StoreError(
                    f"the disk of {self.root} is full while {item.stage} ({item.key}) was being written; "
                    "free some space and run the same command again: what was finished is kept"
                ) from error
        return path

    @contextmanager
    def _lock(self, node: Node) -> Iterator[None]:
        lock = FileLock(str(self.root / node.stage / f"{node.key}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s %s is being built by another process; waiting for it", node.stage, node.key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _publish(self, node: Node, work: Path, seconds: float) -> None:
        names = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file() and p.name != MANIFEST)
        manifest = {
            "stage": node.stage,
            "version": node.version,
            "key": node.key,
            "config": dict(node.config),
            "inputs": {name: parent.key for name, parent in node.inputs.items()},
            "files": {
                name: {"sha256": digest_file(work / name), "bytes": (work / name).stat().st_size} for name in names
            },
            "written_by": __version__,
            "machine": platform.machine(),
            "duration_s": round(seconds, 3),
        }
        write_json(work / MANIFEST, manifest)
        for name in names:
            _fsync(work / name)
        for folder in {work, *((work / n).parent for n in names)}:
            _fsync(folder)
        work.rename(self.path(node))
        _fsync(self.path(node).parent)
        self._verified.add(node.key)


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_files(paths: Iterable[Path], cache_file: Path | None) -> str:
    """sha256 over names and contents of ``paths``; each file's digest is cached by path, size and mtime."""
    cache: dict[str, Any] = {}
    if cache_file is not None and cache_file.exists():
        try:
            cache = read_json(cache_file)
        except ValueError:
            log.warning("%s is damaged and is written anew", cache_file)
    total, changed = hashlib.sha256(), False
    for path in sorted(paths, key=lambda p: p.name):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = cache.get(str(path.resolve()))
        if entry is None or entry["stamp"] != stamp:
            entry = cache[str(path.resolve())] = {"stamp": stamp, "sha256": digest_file(path)}
            changed = True
        total.update(f"{path.name} {entry['sha256']}\n".encode())
    if changed and cache_file is not None:
        write_json(cache_file, cache)
    return total.hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata) if metadata else None)
        temporary.chmod(0o666 & ~_umask())  # the library's own temporary file is readable by its owner only


def disk_is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk, or a quota, is full; safetensors says it in an error of its own."""
    if isinstance(error, SafetensorError):
        return any(f"os error {code}" in str(error) for code in DISK_FULL)
    return isinstance(error, OSError) and error.errno in DISK_FULL


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
