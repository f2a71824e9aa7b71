"""A sweep on W&B, offline: its group, a run a stage, a cell and the sweep, each once however often it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from pipelines.grid import CONF
from pipelines.multirun import run_grid
from pipelines.schema import register
from pmpd.artifacts import Store
from pmpd.config import from_omegaconf
from tests.pipelines.cells import tiny
from tests.tracking.offline import items, wandb_records

REPOSITORY = CONF.parent


def lines(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *tiny(model),
        f"tracking.dir={folder / 'wandb'}",
        f"store={folder / 'store'}",
        *more,
    ]


def runs(folder: Path) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Every offline run by its id: the run, its configuration, and all that it logged."""
    found: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
    for path in folder.glob("wandb/wandb/offline-run-*/*.wandb"):
        records = wandb_records(path)
        (run,) = [r.run for r in records if r.HasField("run")]
        config = items(run.config.update)
        for record in records:
            if record.HasField("config"):
                config |= items(record.config.update)
        logged: dict[str, Any] = {}
        for record in records:
            if record.HasField("history"):
                logged |= items(record.history.item)
        assert run.run_id not in found, "told twice"
        found[run.run_id] = run, config, logged
    return found


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)


@pytest.mark.slow
def test_a_sweep_is_told_once_with_its_stages_cells_and_tables(tiny_llama, tmp_path):
    swept = lines(tiny_llama, tmp_path, "scheduler=high,learned", "run_name=offline")
    assert run_grid(swept, tmp_path / "report") == []
    first = runs(tmp_path)
    store = Store(tmp_path / "store")
    kinds = [run.job_type for run, _, _ in first.values()]
    artifacts = [p.parent for p in store.root.glob("*/*/artifact.json")]
    assert sorted(k for k in kinds if k not in ("cell", "sweep")) == sorted(p.parent.name for p in artifacts)
    assert kinds.count("cell") == 2
    assert kinds.count("sweep") == 1
    assert len({run.run_group for run, _, _ in first.values()}) == 1
    for path in artifacts:  # lineage leads from stage to stage by key
        _, config, _ = first[f"{path.parent.name}-{path.name}"]
        (artifact,) = config["lineage"].values()
        for read in artifact["inputs"].values():
            stage, _, key = read.partition("/")
            assert stage == "source" or f"{stage}-{key}" in first
    (sweep,) = [logged for run, _, logged in first.values() if run.job_type == "sweep"]
    assert sweep["sweep/missing_cells"] == 0
    assert sweep["sweep/results/nrows"] == sweep["sweep/numbers"] > 20
    tables = [p.stem for p in (tmp_path / "report").glob("table_*.csv")]
    assert len(tables) >= 2
    assert all(sweep[f"sweep/{name}/nrows"] > 0 for name in tables)
    pictures = {k.removesuffix("/_type") for k, v in sweep.items() if v == "image-file"}
    assert pictures == {f"sweep/{p.stem}" for p in (tmp_path / "report").glob("*.png")}
    assert run_grid(swept, tmp_path / "report") == []
    assert runs(tmp_path).keys() == first.keys()
    assert len(list((tmp_path / "wandb" / "wandb").glob("offline-run-*"))) == len(first)


def test_the_tuning_sweep_asks_for_what_there_is(tiny_llama):
    sweep = yaml.safe_load((REPOSITORY / "pipelines" / "wandb_sweep.yaml").read_text())
    assert (REPOSITORY / sweep["program"]).exists()
    given = [c for c in sweep["command"] if "=" in c]
    register()
    for at in (0, -1):
        values = {k: [*v.get("values", []), v.get("min"), v.get("max")] for k, v in sweep["parameters"].items()}
        chosen = [f"{k}={[x for x in v if x is not None][at]}" for k, v in values.items()]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = from_omegaconf(compose("config", overrides=[*given, *chosen]))
        assert config.scheduler.name == "learned"


def test_a_trial_is_one_run_that_holds_what_the_tuner_looks_at(tiny_llama, tmp_path, monkeypatch):
    sweep = yaml.safe_load((REPOSITORY / "pipelines" / "wandb_sweep.yaml").read_text())
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert run_grid(lines(tiny_llama, tmp_path, "scheduler=learned", "run_name=trial"), tmp_path / "report") == []
    (found,) = runs(tmp_path).values()
    assert sweep["metric"]["name"] in found[2]
