"""Figures that are drawn when what they show has changed: drawing is most of what a report of cached cells costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from pmpd.files import read_json, write_json
from pmpd.report.parallel import Drawing, draw_all

KNOWN = "figures.json"


class Drawings:
    """The figures of a folder, with a digest of what each was drawn from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._todo: list[Drawing] = []
        self._digests: dict[str, str] = {}
        try:
            self._known: dict[str, str] = dict(read_json(folder / KNOWN))
        except (FileNotFoundError, ValueError, TypeError):
            self._known = {}
        code = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))
        self._code = hashlib.sha256(code + matplotlib.__version__.encode()).hexdigest()

    @property
    def paths(self) -> list[Path]:
        """The PNG of each figure, in the order in which they came."""
        return [self.folder / name for name in self._digests]

    def add(self, function: Callable[..., None], *arguments: Any, name: str) -> None:
        """A figure: ``function(*arguments, path)`` will write ``name`` as PNG and PDF, unless there are both already,
        drawn from the same.

        Arguments are compared by their ``repr``, which plain data and dataclasses of it have in full.
        """
        path = self.folder / name
        said = f"{self._code} {function.__name__} {arguments!r}"
        self._digests[name] = hashlib.sha256(said.encode()).hexdigest()
        if self._known.get(name) != self._digests[name] or not (path.exists() and path.with_suffix(".pdf").exists()):
            self._todo.append(Drawing(function, arguments, path))

    def draw(self) -> None:
        """Draw, remember what was drawn, and remove the figures of an earlier report that are not of this one."""
        draw_all(self._todo)
        for old in set(self._known) - set(self._digests):
            for suffix in (".png", ".pdf"):
                (self.folder / old).with_suffix(suffix).unlink(missing_ok=True)
        write_json(self.folder / KNOWN, dict(sorted(self._digests.items())))
