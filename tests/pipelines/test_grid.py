"""Cells put together from parts are what Hydra composes, one by one."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from pipelines import grid
from pipelines.grid import CONF, compose_grid
from pmpd.config import from_omegaconf


def one_by_one(cells):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [from_omegaconf(compose("config", overrides=cell)) for cell in cells]


def test_parts_that_do_not_meet_give_what_hydra_gives(monkeypatch):
    composed = []
    monkeypatch.setattr(grid, "compose", lambda *a, **k: composed.append(1) or compose(*a, **k))
    cells, configs = compose_grid(
        ["model=vicuna7b,mobilellama,phi1_5", "task=cnndm,iwslt", "scheduler=high,low,static"]
    )
    assert len(cells) == len(configs) == 18
    assert len(composed) == 1 + 1 + 2 + 1 + 2 + 1  # the command line, the first, each axis, the last
    assert configs == one_by_one(cells)


def test_axes_that_change_one_field_are_composed_cell_by_cell():
    # The embedded model brings its own budget, and the budget is swept as well.
    cells, configs = compose_grid(["model=smollm2,vicuna7b", "budget=tiny,quick", "scheduler=high,low"])
    assert configs == one_by_one(cells)
    assert [c.budget.name for c in configs[:4]] == ["tiny", "tiny", "quick", "quick"]


def test_a_file_that_asks_for_something_of_another_group_is_not_put_together_wrongly():
    cells, configs = compose_grid(["model=vicuna7b,smollm2", "task=cnndm,dialogsum", "seed=0,1"])
    assert configs == one_by_one(cells)
    assert {c.budget.name for c in configs} == {"paper", "quick"}
