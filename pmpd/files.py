"""Files that are whole or not there: atomic writes, JSON, tensors, digests. Knows nothing of stores and stages."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")  # two hosts may have a process of one number
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    with atomic(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata) if metadata else None)
        if metadata:
            _order_metadata(temporary)
        temporary.chmod(0o666 & ~_umask())  # the library's own temporary file is readable by its owner only


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes them in an order that changes every time."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "another way of writing JSON"
        stream.seek(8)
        stream.write(ordered.ljust(length))


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


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
