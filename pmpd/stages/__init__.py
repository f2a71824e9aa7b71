"""The pipeline's steps. ``STAGES`` is all of them by name; ``execute`` runs a node of the store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmpd.artifacts import Node
from pmpd.stages.base import SUMMARY, RuntimeConfig, Stage, read_summary
from pmpd.stages.calibration import MOMENTS, SENSITIVITY
from pmpd.stages.decide import DECIDE
from pmpd.stages.dense_sparse import DENSE_SPARSE
from pmpd.stages.evaluate import EVALUATE
from pmpd.stages.fit_static import FIT_STATIC
from pmpd.stages.hyperparameters import HYPERPARAMETERS
from pmpd.stages.inputs import DATA, PROMPTS, SEEDS, TEXTS, WEIGHTS
from pmpd.stages.labels import LABELS
from pmpd.stages.learned import FEATURES, TRAIN_LEARNED
from pmpd.stages.measure import ESTIMATE, GAIN
from pmpd.stages.oracle import ORACLE
from pmpd.stages.quantization import QUANTIZE, QUANTIZE_JOINT, REFIT_TABLES
from pmpd.stages.rollouts import ROLLOUTS
from pmpd.stages.search import SEARCH
from pmpd.stages.timing import LATENCY, LINEARS
from pmpd.stages.tuning import TUNE_TABLES

STAGES: dict[str, Stage[Any]] = {
    stage.name: stage
    for stage in (
        WEIGHTS,
        DATA,
        PROMPTS,
        TEXTS,
        SEEDS,
        SENSITIVITY,
        MOMENTS,
        QUANTIZE,
        QUANTIZE_JOINT,
        REFIT_TABLES,
        TUNE_TABLES,
        SEARCH,
        ROLLOUTS,
        FIT_STATIC,
        FEATURES,
        LABELS,
        TRAIN_LEARNED,
        HYPERPARAMETERS,
        DECIDE,
        DENSE_SPARSE,
        ORACLE,
        EVALUATE,
        ESTIMATE,
        LATENCY,
        LINEARS,
        GAIN,
    )
}


def execute(node: Node, inputs: Mapping[str, Path], out: Path) -> None:
    """Run the stage of ``node``."""
    STAGES[node.stage].execute(node.config, inputs, out)


__all__ = ["STAGES", "SUMMARY", "RuntimeConfig", "Stage", "execute", "read_summary"]
