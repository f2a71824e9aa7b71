"""The hyperparameter search on a tiny model: its point is an artifact, and a second search finds every trial."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmpd.schedulers import load_network

REPOSITORY = Path(__file__).resolve().parents[2]

needs_sweeper = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed: pip install 'pmpd[tune]'",
)


def search(model: Path, folder: Path, *more: str) -> str:
    command = [
        sys.executable,
        "pipelines/tune.py",
        "model=hf",
        f"model.path={model}",
        "model.dtype=float32",
        "model.high_bits=4",
        "model.low_bits=2",
        "data=samples",
        "budget=tiny",
        "task.max_new_tokens=9",
        "task.overlong=truncate",
        "task.metrics=[rouge_l]",
        "tracking=disabled",
        f"store={folder / 'store'}",
        f"hydra.sweep.dir={folder / 'sweep'}",
        *more,
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@needs_sweeper
def test_the_best_trial_becomes_an_artifact_and_a_search_goes_on_where_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    search(tiny_llama, tmp_path, "hydra.sweeper.n_trials=2")
    trained = set((tmp_path / "store" / "train_learned").glob("*/summary.json"))
    assert len(trained) == 2
    said = search(tiny_llama, tmp_path, "hydra.sweeper.n_trials=3")
    now = set((tmp_path / "store" / "train_learned").glob("*/summary.json"))
    assert trained < now
    assert len(now) == 3, "trials that were there were trained again at other points"
    assert "python pipelines/run.py scheduler=learned" in said
    losses = [json.loads(f.read_text())["metrics"]["holdout_loss"] for f in now]
    chosen = [json.loads(f.read_text()) for f in (tmp_path / "store" / "hyperparameters").glob("*/chosen.json")]
    assert min(losses) in [c["holdout_loss"] for c in chosen]
    for point in chosen:
        assert 1e-5 <= point["chosen"]["scheduler.learning_rate"] <= 1e-4
        assert point["chosen"]["scheduler.epochs"] in (3, 5, 10)
    for file in (tmp_path / "store" / "hyperparameters").glob("*/scheduler.safetensors"):
        assert load_network(file).num_classes == 4
