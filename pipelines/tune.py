"""Search the learned scheduler's hyperparameters with Hydra's Optuna sweeper; the chosen point becomes an artifact.

    python pipelines/tune.py model=smollm2 data.root=DIR
    python pipelines/tune.py model=vicuna7b hydra.sweeper.n_trials=30

Needs ``pip install 'pmpd[tune]'``. The space, the number of trials and the sampler are in ``conf/tune.yaml``.
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from pipelines.choices import prefill_bits
from pipelines.learning import network
from pipelines.plan import MissingSearchError, Planner
from pipelines.report import CONF
from pipelines.run import Builder
from pipelines.schema import register
from pmpd.artifacts import Node, Store
from pmpd.config import Config, ConfigError, from_omegaconf
from pmpd.stages import read_summary
from pmpd.stages.hyperparameters import HYPERPARAMETERS, HyperparametersConfig
from pmpd.tracking import open_tracker

log = logging.getLogger("pmpd.tune")

OBJECTIVE = "holdout_loss"
RESULTS = "optimization_results.yaml"
"""What the sweeper writes into the sweep's folder."""

register()


def trial(config: Config, builder: Builder) -> Node:
    """Train at a point; everything but the training is shared by all.

    Raises:
        ValueError, StoreError: as for a run.
    """
    if config.scheduler.policy != "learned":
        raise ConfigError(f"scheduler={config.scheduler.name} is not possible: one that learns, such as learned")
    planner = Planner(config, builder.store)
    try:
        precisions = planner.precisions()
    except MissingSearchError:
        builder.build(planner.search)
        precisions = planner.precisions()
    node = network(planner, config, precisions.levels, prefill_bits(config, precisions))
    builder.build(node)
    return node


class Chosen(Callback):
    """Ends a search: the best point and its network are put into the store."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, after the sweeper has written what it found."""
        results = OmegaConf.load(Path(config.hydra.sweep.dir) / RESULTS)
        assert isinstance(results, DictConfig)
        best = {str(k): v for k, v in results.best_params.items()}
        sweeper = config.hydra.sweeper
        given = [str(o) for o in config.hydra.overrides.task if str(o).partition("=")[0] not in best]
        overrides = [*given, *(f"{name}={value}" for name, value in best.items())]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="tune"):
            chosen = from_omegaconf(compose("config", overrides=["scheduler=learned", *overrides]))
        tracker = _tracker(chosen, "tune-chosen")
        try:
            builder = Builder(Store(Path(chosen.store)), tracker)
            node = HYPERPARAMETERS.node(
                HyperparametersConfig(
                    {str(k): str(v) for k, v in sweeper.params.items()}, best, int(sweeper.n_trials), OBJECTIVE
                ),
                network=trial(chosen, builder),
            )
            builder.build(node)
        finally:
            tracker.finish()
        metrics = read_summary(builder.store.verify(node.inputs["network"]))["metrics"]  # type: ignore[arg-type]
        log.info(
            "chosen of %d trials: %s = %.4f on %d held-out seed prompts (accuracy %.2f, of always saying the commonest "
            "class %.2f); artifact %s\nuse it with: python pipelines/run.py scheduler=learned %s",
            sweeper.n_trials,
            OBJECTIVE,
            metrics[OBJECTIVE],
            metrics["num_holdout"],
            metrics["holdout_accuracy"],
            metrics["majority_accuracy"],
            builder.store.path(node),
            shlex.join(overrides),
        )


def _tracker(config: Config, name: str) -> Any:
    tracking = config.tracking
    return open_tracker(
        tracking.mode.value,
        project=tracking.project,
        entity=tracking.entity,
        dir=tracking.dir,
        config={},
        group=config.run_name,
        name=name,
        tags=[config.model.name, "tune"],
    )


@hydra.main(config_path="../conf", config_name="tune", version_base="1.3")
def main(node: DictConfig) -> float:
    """Hydra's entry, once a trial: the objective of its point."""
    config = from_omegaconf(node)
    tracker = _tracker(config, f"tune-{HydraConfig.get().job.num}")
    try:
        builder = Builder(Store(Path(config.store)), tracker)
        trained = trial(config, builder)
    finally:
        tracker.finish()
    return float(read_summary(builder.store.verify(trained))["metrics"][OBJECTIVE])


if __name__ == "__main__":
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        sys.exit("error: the search needs Hydra's Optuna sweeper: pip install 'pmpd[tune]'")
    main()
