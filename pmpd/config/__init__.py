"""The typed configuration of one cell, and the rules that refuse an impossible one.

A *cell* is one model, one task, one scheduler at one budget: one row of a table. This is the only package of the
library that imports OmegaConf; Hydra composes, in ``pipelines``.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from pmpd.config.names import did_you_mean, near, strangers
from pmpd.config.rules import (
    UNIFORM,
    ConfigError,
    check,
    check_dense_sparse,
    check_precisions,
    given_steps,
    grid,
    max_new_tokens,
)
from pmpd.config.schema import (
    BudgetConfig,
    Config,
    DataConfig,
    Device,
    DType,
    Feature,
    GpuConfig,
    HardwareConfig,
    Hindsight,
    LauncherConfig,
    LauncherKind,
    Level,
    Metric,
    ModelConfig,
    NeedsConfig,
    NpuConfig,
    Overlong,
    QuantizerConfig,
    QuantizerKind,
    ReportKind,
    SchedulerConfig,
    SchedulerKind,
    Solver,
    TaskConfig,
    TaskKind,
    TrackingConfig,
    TrackingMode,
)

__all__ = [
    "UNIFORM",
    "BudgetConfig",
    "Config",
    "ConfigError",
    "DType",
    "DataConfig",
    "Device",
    "Feature",
    "GpuConfig",
    "HardwareConfig",
    "Hindsight",
    "LauncherConfig",
    "LauncherKind",
    "Level",
    "Metric",
    "ModelConfig",
    "NeedsConfig",
    "NpuConfig",
    "Overlong",
    "QuantizerConfig",
    "QuantizerKind",
    "ReportKind",
    "SchedulerConfig",
    "SchedulerKind",
    "Solver",
    "TaskConfig",
    "TaskKind",
    "TrackingConfig",
    "TrackingMode",
    "check",
    "check_dense_sparse",
    "check_precisions",
    "from_omegaconf",
    "given_steps",
    "grid",
    "max_new_tokens",
]


def from_omegaconf(node: Any) -> Config:
    """The typed, checked configuration behind a composed OmegaConf node.

    Raises:
        ConfigError: a field that does not exist was added, or a combination that cannot be run.
        omegaconf.errors.OmegaConfBaseException: a missing or ill-typed field.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), node)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    if added := strangers(config):
        raise ConfigError(f"+{added[0]} is not possible: there is no field {added[0]}{did_you_mean(near(added[0]))}")
    check(config)
    return config
