"""Local data files: which file holds a split, what is in it, and what is wrong with it.

One layout for every data set: ``DIR/<dataset>/<split>.jsonl`` or ``.jsonl.gz``, one JSON object a line in
the columns of the hub. Knows nothing of what the columns mean, and nothing of the hub (``pmpd.tasks.hub``).
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

SAMPLES = "samples"
"""The root that stands for the texts shipped in the package."""

SUFFIXES = (".jsonl", ".jsonl.gz")
LAYOUT = "DIR/<dataset>/<split>.jsonl or .jsonl.gz"


class DataError(ValueError):
    """Data that is missing, damaged or not what the task expects; the message says where and what to do."""


def samples_root() -> Path:
    """The folder of the shipped texts."""
    return Path(str(resources.files("pmpd.tasks") / SAMPLES))


def locate(dataset: str, split: str, root: str | None) -> Path | None:
    """The file of ``split`` under ``root``: ``"samples"``, a folder, or None, for which the answer is None (the hub).

    Raises:
        DataError: the root or the split is not there, or is there twice.
    """
    if root is None:
        return None
    folder = samples_root() if root == SAMPLES else Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={root} is not a folder; expected {LAYOUT}, or data.root={SAMPLES}")
    found = [path for suffix in SUFFIXES if (path := folder / dataset / f"{split}{suffix}").is_file()]
    if len(found) == 2:
        raise DataError(f"{found[0]} and {found[1].name} are both there; keep the one that is meant")
    if found:
        return found[0]
    raise DataError(_missing(dataset, split, root, folder))


def available(folder: Path) -> dict[str, list[str]]:
    """The splits of every data set under ``folder``, both sorted."""
    sets: dict[str, set[str]] = {}
    for suffix in SUFFIXES:
        for path in folder.glob(f"*/*{suffix}"):
            sets.setdefault(path.parent.name, set()).add(path.name.removesuffix(suffix))
    return {name: sorted(sets[name]) for name in sorted(sets)}


def _missing(dataset: str, split: str, root: str, folder: Path) -> str:
    message = f"data.root={root} has no {dataset}/{split}.jsonl or .jsonl.gz"
    sets = available(folder)
    if not sets:
        if any((folder / f"{split}{suffix}").is_file() for suffix in SUFFIXES):
            return f"{message}; {split} lies in that folder itself: the layout is {LAYOUT}, so give the folder above it"
        return f"{message}; it holds no data set at all, expected {LAYOUT}"
    near = difflib.get_close_matches(split if dataset in sets else dataset, sets.get(dataset, list(sets)), n=1)
    if near:
        message += f"; did you mean {dataset}/{near[0]}?" if dataset in sets else f"; did you mean {near[0]}?"
    present = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in sets.items())
    return f"{message}\nIt has {present}"


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Every row of a JSONL file, gzipped if its name ends in ``.gz``. Blank lines are no rows.

    Args:
        columns: what each row must have; more is allowed and kept.

    Raises:
        DataError: file, line and problem: damaged JSON, gzip or UTF-8, missing columns, no rows at all.
    """
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: damaged JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object is expected, found {type(row).__name__}")
        if missing := [name for name in columns if name not in row]:
            raise DataError(
                f"{path}, line {number}: no column {', '.join(missing)}; "
                f"found {', '.join(sorted(row)) or 'none'}, expected {', '.join(columns)}"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty: not one row")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines. Read as bytes: only a line feed ends a line, not the separators inside texts."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for raw in stream:
                number += 1
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip after line {number} ({error}); copy or download it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
