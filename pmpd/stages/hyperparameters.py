"""The outcome of a hyperparameter search: the chosen point and the network trained there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.artifacts import write_json
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.learned import NETWORK_FILE

CHOSEN_FILE = "chosen.json"


@dataclass(frozen=True)
class HyperparametersConfig:
    """What was searched and what was found.

    Attributes:
        space: what each field could be, in Hydra's words.
        chosen: its value.
    """

    space: dict[str, str]
    chosen: dict[str, Any]
    num_trials: int
    objective: str


def run_hyperparameters(config: HyperparametersConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write the chosen point, its objective, and the network of the ``network`` input."""
    metrics = read_summary(inputs["network"])["metrics"]
    value = metrics[config.objective]
    write_json(out / CHOSEN_FILE, {"chosen": config.chosen, config.objective: value})
    shutil.copyfile(inputs["network"] / NETWORK_FILE, out / NETWORK_FILE)
    write_summary(out, {**config.chosen, config.objective: value, "num_trials": config.num_trials})


HYPERPARAMETERS = Stage("hyperparameters", 1, HyperparametersConfig, run_hyperparameters, "milliseconds")
