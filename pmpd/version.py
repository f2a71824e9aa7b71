"""Which code this is: the version, and in a checkout its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pmpd import __version__

GIT_TIMEOUT_S = 10.0


def code_version() -> str:
    """``0.1.0+g<commit>`` (``.dirty`` if tracked files were changed), ``0.1.0`` outside a checkout of this code."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside somebody else's checkout
        commit = git("rev-parse", "--short=12", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if dirty else ''}"
