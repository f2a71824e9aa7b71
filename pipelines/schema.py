"""Registers the typed schemas with Hydra, in a group of their own, so that every yaml starts from one."""

from __future__ import annotations

import dataclasses

from hydra.core.config_store import ConfigStore

from pmpd.config import Config, GpuConfig, HardwareConfig, NpuConfig


def register() -> None:
    """``schema/<group>`` for every group of :class:`Config` (hardware: one a kind), ``schema/cell`` for the whole."""
    store = ConfigStore.instance()
    store.store(group="schema", name="cell", node=Config)
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default_factory) and field.default_factory is not HardwareConfig:
            store.store(group="schema", name=field.name, node=field.default_factory)
    for name, kind in (("npu", NpuConfig), ("gpu", GpuConfig)):
        store.store(group="schema", name=name, node=kind)
