"""Where this library keeps what it made for a user. Knows not what that is."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """``pmpd`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pmpd"
