"""Cells of a tiny random model on shipped samples, composed and run as the command line does."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from pipelines.grid import CONF
from pipelines.run import run_cell
from pipelines.schema import register
from pmpd.config import Config, from_omegaconf


def tiny(model: Path, max_new_tokens: int = 6) -> list[str]:
    """Choices of a tiny cell: ``model`` at 4 and 2 bits on shipped samples."""
    return [
        "model=hf",
        f"model.path={model}",
        "model.dtype=float32",
        "model.high_bits=4",
        "model.low_bits=2",
        "data=samples",
        "budget=tiny",
        "task.overlong=truncate",
        f"task.max_new_tokens={max_new_tokens}",
        "task.metrics=[rouge_l]",
    ]


def overrides(model: Path, store: Path, *more: str) -> list[str]:
    return [*tiny(model, max_new_tokens=9), "tracking=disabled", f"store={store}", *more]


def cell(*lines: str) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_omegaconf(compose("config", overrides=list(lines)))


def run(model: Path, store: Path, out: Path, *more: str) -> pd.DataFrame:
    run_cell(cell(*overrides(model, store, *more)), out)
    return pd.read_csv(out / "results.csv")
