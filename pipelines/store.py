"""Look into a store, and clean it: what is there, how large it is, whether it is whole, and where a number came from.

    python pipelines/store.py ls [STAGE] [--store DIR]      every artifact: stage, key, size, when, how long it took
    python pipelines/store.py du                            bytes a stage, and what gc would free
    python pipelines/store.py gc [--delete]                 what nothing needs: parts of killed stages, old locks
    python pipelines/store.py verify [KEY ...]              digests of every file, or of these artifacts'
    python pipelines/store.py why KEY                       recipe and inputs, back to weights and data with digests
    python pipelines/store.py why outputs/paper/NAME/results.csv:ROW

Reads manifests, never a weight, except for verify. gc refuses while a stage is being built.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pmpd.artifacts import MANIFEST, Store, StoreError, digest_file, read_json
from pmpd.locks import ABANDONED_AFTER_S, holder

LOCK, WORK = ".lock", ".work"
FORGOTTEN_AFTER_S = 20 * ABANDONED_AFTER_S
"""A lock that is silent for so long is nobody's, whatever two hosts' clocks differ by."""


@dataclass(frozen=True)
class Artifact:
    """A published artifact as its manifest has it; ``manifest`` is empty where that is damaged."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest.get("files", {}).values())


def artifacts(root: Path, stage: str = "*") -> Iterator[Artifact]:
    """Every published artifact, by stage and key."""
    for path in sorted(root.glob(f"{stage}/*/{MANIFEST}")):
        if path.parent.suffix:  # work that is about to be published, or damage being removed
            continue
        try:
            manifest = dict(read_json(path))
        except (ValueError, TypeError):
            manifest = {}
        yield Artifact(path.parent, manifest)


def find(root: Path, key: str) -> Artifact:
    """The artifact whose key starts with ``key``.

    Raises:
        StoreError: none, or several.
    """
    found = [a for a in artifacts(root) if a.key.startswith(key)]
    if len(found) != 1:
        raise StoreError(f"{len(found)} artifacts in {root} have a key that starts with {key!r}; give one key")
    return found[0]


def list_artifacts(root: Path, stage: str) -> Iterator[str]:
    """A line an artifact."""
    yield f"{'stage':<15} {'key':<16} {'size':>10} {'took':>9}  written"
    for artifact in artifacts(root, stage):
        if not artifact.manifest:
            yield f"{artifact.stage:<15} {artifact.key:<16} damaged manifest"
            continue
        when = datetime.fromtimestamp((artifact.path / MANIFEST).stat().st_mtime).isoformat(" ", "minutes")
        took = f"{artifact.manifest.get('duration_s', 0):.1f} s"
        yield f"{artifact.stage:<15} {artifact.key:<16} {size(artifact.num_bytes):>10} {took:>9}  {when}"


def usage(root: Path) -> Iterator[str]:
    """Bytes by stage, largest first, and what :func:`garbage` holds."""
    stages: dict[str, tuple[int, int]] = {}
    for artifact in artifacts(root):
        count, total = stages.get(artifact.stage, (0, 0))
        stages[artifact.stage] = count + 1, total + artifact.num_bytes
    for stage, (count, total) in sorted(stages.items(), key=lambda item: -item[1][1]):
        yield f"{size(total):>10}  {stage} ({count})"
    yield f"{size(sum(total for _, total in stages.values())):>10}  in all"
    yield f"{size(sum(map(_bytes, garbage(root)))):>10}  more that gc would free"


def garbage(root: Path) -> list[Path]:
    """What no later run reads: parts, locks and errors of artifacts that are there, damage set aside, temporary files.

    Parts of a stage that was killed and is not finished are kept: the next run resumes from them.
    """
    found = [p for p in root.glob("*/*.damaged") if p.is_dir()]
    found += [p for p in root.rglob("*.tmp") if WORK not in p.parent.suffix]
    for path in root.glob("*/*"):
        published = path.parent / path.name.partition(".")[0] / MANIFEST
        if published.exists() and (path.name.endswith((LOCK, ".error.json")) or path.suffix == WORK):
            found.append(path)
    latest: dict[Path, Path] = {}
    for path in sorted(root.glob(f"*/*{WORK}"), key=lambda p: int(p.suffixes[-2][1:]) if len(p.suffixes) > 1 else -1):
        base = path.parent / path.name.partition(".")[0]
        if base in latest:
            found.append(latest[base])  # a turn that came after it has what there was
        latest[base] = path
    return sorted(set(found))


def collect_garbage(root: Path, delete: bool) -> Iterator[str]:
    """List, or delete, what nothing needs.

    Raises:
        StoreError: something is being built.
    """
    for path in sorted(root.glob(f"*/*.0{LOCK}")):
        held = holder(path.parent, path.name.partition(".")[0])
        if held is not None and held["age_s"] < FORGOTTEN_AFTER_S:
            raise StoreError(
                f"{path.parent.name} {path.name.partition('.')[0]} is being built by process {held['pid']} of "
                f"{held['host']} (heard {held['age_s']:.0f} s ago); gc waits for no one: run it later"
            )
    total = 0
    for path in garbage(root):
        total += _bytes(path)
        yield f"{size(_bytes(path)):>10}  {path.relative_to(root)}"
        if delete:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    yield f"{size(total):>10}  {'freed' if delete else 'would be freed; --delete does it'}"


def verify(root: Path, keys: Sequence[str]) -> Iterator[str]:
    """A line for every file that is not what was written, and a count at the end."""
    chosen = [find(root, key) for key in keys] if keys else list(artifacts(root))
    damaged = 0
    for artifact in chosen:
        wrong = list(_wrong(artifact))
        damaged += bool(wrong)
        yield from (f"{artifact.stage} {artifact.key}: {line}" for line in wrong)
    yield f"{len(chosen)} artifacts, {damaged} damaged"


def _wrong(artifact: Artifact) -> Iterator[str]:
    if not artifact.manifest:
        yield f"{MANIFEST} is damaged"
    for name, expected in artifact.manifest.get("files", {}).items():
        file = artifact.path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif digest_file(file) != expected["sha256"]:
            yield f"{name} differs from its digest"


def why(root: Path, what: str) -> Iterator[str]:
    """Where an artifact, or a row of a results.csv, came from: a recipe a line, inputs indented below it.

    Raises:
        StoreError: no such artifact or row, or one without a key.
    """
    file, colon, row = what.rpartition(":")
    if colon and file.endswith(".csv"):
        with Path(file).open(encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
        if not row.isdigit() or not 2 <= int(row) <= len(lines) + 1:
            raise StoreError(f"{file} has rows 2 to {len(lines) + 1} (1 is its header), not {row}")
        found = lines[int(row) - 2]
        yield ", ".join(f"{k}={v}" for k, v in found.items() if v)
        what = found.get("key") or ""
        if not what:
            raise StoreError(
                f"{file} has no key in row {row}; an experiment's results.csv has (but for npu, whose numbers are "
                "computed from conf/hardware alone)"
            )
    start = find(root, what)
    known = {a.key: a for a in artifacts(root)}
    yield from _explain(start, known, "", set())


def _explain(artifact: Artifact, known: dict[str, Artifact], indent: str, told: set[str]) -> Iterator[str]:
    manifest = artifact.manifest
    again = " (above)" if artifact.key in told else ""
    yield f"{indent}{artifact.stage} {artifact.key} version {manifest.get('version')}{again}"
    if again:
        return
    told.add(artifact.key)
    config = json.dumps(manifest.get("config", {}), sort_keys=True, ensure_ascii=False)
    yield f"{indent}  recipe {config}"
    yield f"{indent}  by pmpd {manifest.get('written_by')} on {manifest.get('machine')}, {manifest.get('duration_s')} s"
    for name, file in sorted(manifest.get("files", {}).items()):
        yield f"{indent}  file {name} {file['bytes']} bytes sha256 {file['sha256']}"
    sources = manifest.get("sources", {})
    for name, key in manifest.get("inputs", {}).items():
        if key in known:
            yield f"{indent}  {name}:"
            yield from _explain(known[key], known, indent + "    ", told)
        elif name in sources:
            yield f"{indent}  {name}: source {sources[name]}, content {key}"
        else:
            yield f"{indent}  {name}: {key}, not in this store (a cached artifact does not need its inputs)"


def size(num_bytes: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where verify finds damage or something is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="outputs/store", help="the store's folder (outputs/store)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls").add_argument("stage", nargs="?", default="*")
    commands.add_parser("du")
    commands.add_parser("gc").add_argument("--delete", action="store_true")
    commands.add_parser("verify").add_argument("keys", nargs="*")
    commands.add_parser("why").add_argument("what", help="a key, the start of one, or a row of a results.csv")
    for command in commands.choices.values():
        command.add_argument("--store", default=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    root = Path(given.store)
    try:
        if not root.is_dir():
            raise StoreError(f"there is no store {root}; give --store DIR")
        Store(root)  # refuses what is no store, or of another format
        lines = {
            "ls": lambda: list_artifacts(root, given.stage),
            "du": lambda: usage(root),
            "gc": lambda: collect_garbage(root, given.delete),
            "verify": lambda: verify(root, given.keys),
            "why": lambda: why(root, given.what),
        }[given.command]()
        last = ""
        for last in lines:
            print(last)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(given.command == "verify" and not last.endswith(" 0 damaged"))


if __name__ == "__main__":
    sys.exit(main())
