"""A grid of cells from one command line, composed by Hydra: an experiment's own sweep, or one given by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipelines.schema import register
from pmpd.config import Config, check, from_omegaconf

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Grid:
    """The cells that overrides stand for.

    Attributes:
        plain: overrides that all cells have.
        axes: the values of each swept key, as overrides.
    """

    plain: list[str]
    axes: list[list[str]]

    @property
    def cells(self) -> list[list[str]]:
        """The overrides of every cell, the last axis running fastest."""
        return [[*self.plain, *choice] for choice in itertools.product(*self.axes)]


def grid_of(overrides: Sequence[str]) -> list[list[str]]:
    """The override lists of every cell: an experiment's own sweep, with what is given on the command line."""
    return parse(overrides).cells


def parse(overrides: Sequence[str]) -> Grid:
    """An experiment's own sweep, with what is given on the command line; Hydra must be initialised."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {o.get_key_element(): list(o.sweep_string_iterator()) for o in parsed if o.is_sweep_override()}
    plain = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    base = compose("config", overrides=plain, return_hydra_config=True)
    params = dict(base.hydra.sweeper.params or {})
    named = {o.get_key_element() for o in parsed}
    for override in OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items() if k not in named]):
        key = override.get_key_element()
        swept[key] = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
    return Grid(plain, [[f"{key}={value}" for value in values] for key, values in swept.items()])


def compose_grid(overrides: Sequence[str]) -> tuple[list[list[str]], list[Config]]:
    """The overrides and the configuration of every cell of a grid.

    Raises:
        ValueError, HydraException, OmegaConfBaseException: a cell that does not compose.
    """
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="report"):
        grid = parse(overrides)
        return grid.cells, _compose(grid)


def _compose(grid: Grid) -> list[Config]:
    """Every cell's configuration.

    Hydra takes 0.1 to 0.2 s for a cell. Where no two axes change one field of the configuration, a cell is put together
    from those that differ from the first in one axis only; the last cell, which differs in all, is composed and
    compared, and if it is another, as where a group's file asks for something of another's, all are composed.
    """
    first = [axis[0] for axis in grid.axes]

    def whole(choice: Sequence[str]) -> Config:
        return from_omegaconf(compose("config", overrides=[*grid.plain, *choice]))

    base = whole(first)
    changes: dict[str, dict[str, object]] = {}  # by override: the fields that it changes, and to what
    owner: dict[str, int] = {}
    for k, axis in enumerate(grid.axes):
        for value in axis[1:]:
            changes[value] = changed(base, whole([*first[:k], value, *first[k + 1 :]]))
            if any(owner.setdefault(name, k) != k for name in changes[value]):
                return [whole(choice) for choice in itertools.product(*grid.axes)]

    def parts(choice: Sequence[str]) -> Config:
        config = base
        for k, value in enumerate(choice):
            if value != first[k]:
                config = dataclasses.replace(config, **changes[value])  # type: ignore[arg-type]
        return config

    last = [axis[-1] for axis in grid.axes]
    if parts(last) != whole(last):
        return [whole(choice) for choice in itertools.product(*grid.axes)]
    configs = [parts(choice) for choice in itertools.product(*grid.axes)]
    for config in configs:
        check(config)
    return configs


def changed(one: Config, two: Config) -> dict[str, object]:
    """The fields in which ``two`` differs from ``one``, with its values."""
    names = [f.name for f in dataclasses.fields(one)]
    return {name: getattr(two, name) for name in names if getattr(one, name) != getattr(two, name)}


__all__ = ["CONF", "Grid", "changed", "compose_grid", "grid_of", "parse"]
