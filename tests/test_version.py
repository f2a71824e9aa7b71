"""Which code a run says it was."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pmpd import __version__, version
from pmpd.version import code_version


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_code_version_names_commit_and_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "pmpd" / "version.py"
    module.parent.mkdir()
    module.write_text("# one\n")
    monkeypatch.setattr(version, "__file__", str(module))
    assert code_version() == __version__  # no checkout

    git(tmp_path, "init")
    (tmp_path / "other").write_text("x")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "somebody else's checkout")
    assert code_version() == __version__

    git(tmp_path, "add", "pmpd")
    git(tmp_path, "commit", "-m", "this code")
    commit = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert code_version() == f"{__version__}+g{commit[:12]}"
    module.write_text("# two\n")
    assert code_version() == f"{__version__}+g{commit[:12]}.dirty"


def test_code_version_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version() == __version__
