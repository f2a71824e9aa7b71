"""Draws figures in several processes: matplotlib keeps one core busy, and a grid has many figures.

Knows functions that draw, not what they draw. The processes are plain ones that import this module: those of
``multiprocessing`` would import the program's own main module again, seconds of Hydra and PyTorch, or be forks of a
process that has threads.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORTH_A_PROCESS = 6
"""Figures that take longer to draw than a process to start: 0.3 s of a core each, against 0.8 s of imports."""


@dataclass(frozen=True)
class Drawing:
    """``function(*arguments, path)`` writes ``path`` as PNG and PDF; it is a module's, so that a process finds it."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    path: Path

    def draw(self) -> None:
        self.function(*self.arguments, self.path)


def draw_all(drawings: Sequence[Drawing], processes: int | None = None) -> None:
    """Draw in this process and ``processes - 1`` fresh ones; None: as many as there are cores and figures for.

    Raises:
        subprocess.CalledProcessError: one of them failed; it has said why.
    """
    if processes is None:
        processes = 1 + min(_cores() - 1, len(drawings) // WORTH_A_PROCESS)
    shares = [drawings[k::processes] for k in range(processes)]
    command = [sys.executable, "-m", __name__]
    # In sessions of their own: Ctrl-C comes to this process alone, which ends them.
    helpers = [subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) for _ in shares[1:]]
    try:
        for helper, share in zip(helpers, shares[1:], strict=True):
            assert helper.stdin is not None
            with helper.stdin as stream:
                pickle.dump(share, stream)
        for drawing in shares[0]:
            drawing.draw()
    except BaseException:
        for helper in helpers:
            helper.kill()
        raise
    finally:
        codes = [helper.wait() for helper in helpers]
    for helper, code in zip(helpers, codes, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, helper.args)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    for one in pickle.load(sys.stdin.buffer):
        one.draw()
