"""Fixtures that every package of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; read when torch loads


import pytest

from tests.tiny import tiny_model_dir


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer; shared by the session, so never write into it."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"), "llama")
