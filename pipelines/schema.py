"""Registers the typed schemas with Hydra, in a group of their own, so that every yaml starts from one."""

from __future__ import annotations

import dataclasses

from hydra.core.config_store import ConfigStore

from pmpd.config import Config


def register() -> None:
    """``schema/<group>`` for every group of :class:`Config`, and ``schema/cell`` for the whole."""
    store = ConfigStore.instance()
    store.store(group="schema", name="cell", node=Config)
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default_factory):
            store.store(group="schema", name=field.name, node=field.default_factory)
