"""Fixtures that every package of tests may use."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Workers share the cores. Read when torch and numba load; numba's OpenMP layer sets torch's number to its own.
for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


import pytest

from tests.tiny import tiny_model_dir


class Stderr(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], io.StringIO]:
    """``stderr("terminal")`` or ``stderr("log")``: what is written to stderr from now on, which is one or a file."""

    def become(kind: str) -> io.StringIO:
        stream = Stderr(terminal={"terminal": True, "log": False}[kind])
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return become


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer; shared by the session, so never write into it."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"), "llama")
