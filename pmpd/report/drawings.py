"""Figures that are drawn when what they show has changed: drawing is most of what a report of cached cells costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from pmpd.files import read_json, write_json

KNOWN = "figures.json"


class Drawings:
    """The figures of a folder, with a digest of what each was drawn from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []
        try:
            self._known: dict[str, str] = dict(read_json(folder / KNOWN))
        except (FileNotFoundError, ValueError, TypeError):
            self._known = {}
        code = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))
        self._code = hashlib.sha256(code + matplotlib.__version__.encode()).hexdigest()

    def draw(self, function: Callable[..., None], *arguments: Any, name: str) -> None:
        """``function(*arguments, path)`` writes ``name`` as PNG and PDF, unless both are there, drawn from the same.

        Arguments are compared by their ``repr``, which plain data and dataclasses of it have in full.
        """
        path = self.folder / name
        self.paths.append(path)
        said = f"{self._code} {function.__name__} {arguments!r}"
        digest = hashlib.sha256(said.encode()).hexdigest()
        if self._known.get(name) != digest or not (path.exists() and path.with_suffix(".pdf").exists()):
            function(*arguments, path)
            self._known[name] = digest

    def close(self) -> None:
        """Remember what was drawn, and remove the figures of an earlier report that are not of this one."""
        for old in set(self._known) - {p.name for p in self.paths}:
            for suffix in (".png", ".pdf"):
                (self.folder / old).with_suffix(suffix).unlink(missing_ok=True)
        write_json(self.folder / KNOWN, {name: self._known[name] for name in sorted(p.name for p in self.paths)})
