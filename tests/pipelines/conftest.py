"""Fixtures of the whole pipeline on a tiny random model: what it decodes is noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipelines.cells import run


@pytest.fixture(scope="session")
def store(tmp_path_factory, tiny_llama) -> Path:
    """A store that holds all five schedulers."""
    folder = tmp_path_factory.mktemp("pipeline")
    for scheduler in ("fp16", "high", "low", "static", "learned"):
        run(tiny_llama, folder / "store", folder / scheduler, f"scheduler={scheduler}")
    return folder / "store"


@pytest.fixture
def two_turns(tmp_path) -> Path:
    rows = [
        {"prompt": [f"Name {n} birds.", "Now the shortest."], "reference": [], "prompt_id": n, "category": "writing"}
        for n in range(3, 7)
    ]
    folder = tmp_path / "data" / "mt_bench_prompts"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "data"
