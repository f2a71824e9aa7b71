"""Search the learned scheduler's hyperparameters with Hydra's Optuna sweeper; the chosen point becomes an artifact.

    python pipelines/tune.py model=smollm2 data.root=DIR
    python pipelines/tune.py model=vicuna7b hydra.sweeper.n_trials=30

Needs ``pip install 'pmpd[tune]'``. The space, the number of trials and the sampler are in ``conf/tune.yaml``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pipelines.interrupts import leave_at_once

if __name__ == "__main__":
    leave_at_once()
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in run.py

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from pipelines.answer import ANSWERED, answer, answered, ending
from pipelines.choices import prefill_bits
from pipelines.grid import CONF
from pipelines.learning import network
from pipelines.plan import MissingSearchError, Planner
from pipelines.schema import register
from pipelines.track import Tracking
from pmpd.artifacts import Node, Store
from pmpd.config import Config, ConfigError, from_omegaconf
from pmpd.stages import execute, read_summary
from pmpd.stages.hyperparameters import HYPERPARAMETERS, HyperparametersConfig

log = logging.getLogger("pmpd.tune")

OBJECTIVE = "holdout_loss"
RESULTS = "optimization_results.yaml"
"""What the sweeper writes into the sweep's folder."""

register()


def trial(config: Config, store: Store, tracking: Tracking) -> Node:
    """Train at a point; everything but the training is shared by all.

    Raises:
        ValueError, StoreError: as for a run.
    """
    if config.scheduler.policy != "learned":
        raise ConfigError(f"scheduler={config.scheduler.name} is not possible: one that learns, such as learned")
    planner = Planner(config, store)
    try:
        precisions = planner.precisions()
    except MissingSearchError:
        _build(planner.search, store, tracking)
        precisions = planner.precisions()
    node = network(planner, config, precisions.levels, prefill_bits(config, precisions))
    _build(node, store, tracking)
    return node


def _build(node: Node, store: Store, tracking: Tracking) -> None:
    store.materialize(node, execute)
    tracking.stages(node)


class Chosen(Callback):
    """Ends a search with its choice."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, after the sweeper has written what it found."""
        with ending():
            choose(config)


def choose(config: DictConfig) -> None:
    """Put the best point of the search that ran under ``config``, and its network, into the store.

    Raises:
        ValueError, StoreError: as for a trial.
    """
    results = OmegaConf.load(Path(config.hydra.sweep.dir) / RESULTS)
    assert isinstance(results, DictConfig)
    best = {str(k): v for k, v in results.best_params.items()}
    sweeper = config.hydra.sweeper
    given = [str(o) for o in config.hydra.overrides.task if str(o).partition("=")[0] not in best]
    overrides = [*given, *(f"{name}={value}" for name, value in best.items())]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="tune"):
        chosen = from_omegaconf(compose("config", overrides=["scheduler=learned", *overrides]))
    store = Store(Path(chosen.store))
    tracking = Tracking(chosen, chosen.run_name, store)
    space = {str(k): str(v) for k, v in sweeper.params.items()}
    trained = trial(chosen, store, tracking)
    node = HYPERPARAMETERS.node(HyperparametersConfig(space, best, int(sweeper.n_trials), OBJECTIVE), network=trained)
    _build(node, store, tracking)
    metrics = read_summary(store.verify(trained))["metrics"]
    log.info(
        "chosen of %d trials: %s = %.4f on %d held-out seed prompts (accuracy %.2f, of always saying the commonest "
        "class %.2f); artifact %s\nuse it with: python pipelines/run.py scheduler=learned %s",
        sweeper.n_trials,
        OBJECTIVE,
        metrics[OBJECTIVE],
        metrics["num_holdout"],
        metrics["holdout_accuracy"],
        metrics["majority_accuracy"],
        store.path(node),
        shlex.join(overrides),
    )


@hydra.main(config_path="../conf", config_name="tune", version_base="1.3")
def main(node: DictConfig) -> float:
    """Hydra's entry, once a trial: the objective of its point."""
    try:
        config = from_omegaconf(node)
        store = Store(Path(config.store))
        trained = trial(config, store, Tracking(config, config.run_name, store))
    except ANSWERED as error:
        sys.exit(answer(error))
    return float(read_summary(store.verify(trained))["metrics"][OBJECTIVE])


if __name__ == "__main__":
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        sys.exit("error: the search needs Hydra's Optuna sweeper: pip install 'pmpd[tune]'")
    answered(main)
