"""A run on W&B: what an offline one holds, and that no failure of W&B's costs more than a warning."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmpd import tracking
from pmpd.tracking import NullTracker, open_tracker
from pmpd.version import code_version
from tests.tracking.offline import items, only_warning, open_offline, wandb_records


def test_where_runs_are_is_said_once_for_all_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pmpd.tracking.tracker"):
        for name in ("first", "second"):
            open_offline(tmp_path, group="g", name=name, tags=[]).finish()
    said = [record.getMessage() for record in caplog.records if "wandb sync" in record.getMessage()]
    assert len(said) == 1
    assert f"are in {tmp_path / 'wandb'};" in said[0]


def test_an_offline_run_can_be_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_offline(tmp_path, group="table-1", name="cell", tags=["quick"])
    tracker.metrics("evaluate", {"rouge_l": 0.25, "signature": "tok:13a"})
    tracker.curve("search", "perplexity", [{"bits": 2, "c4": 9.0}, {"bits": 3, "c4": 5.0}])
    tracker.table("report", "rows", [{"model": "tiny", "bits": 2.5}, {"model": "tiny", "n": 12}])
    tracker.lineage("quantize", "k1", {"model": "m0"}, "store/quantize/k1")
    tracker.lineage("rollouts", "k2", {"quantize": "k1"}, "store/rollouts/k2")
    tracker.finish()

    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(path)
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == ("pmpd-test", "table-1", "cell", ["quick"])
    config = items(run.config.update)
    assert config["model"] == {"name": "tiny"}
    assert config["code_version"] == code_version()

    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert history[0].items() >= {"evaluate/rouge_l": 0.25, "evaluate/signature": "tok:13a"}.items()
    assert [(row["search/perplexity/bits"], row["search/perplexity/c4"]) for row in history[1:3]] == [(2, 9), (3, 5)]
    steps = {record.metric.name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert steps["search/perplexity/c4"] == "search/perplexity/bits"

    (table,) = path.parent.glob("files/media/table/report/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["model", "bits", "n"]
    assert content["data"] == [["tiny", 2.5, None], ["tiny", None, 12]]

    updates: dict[str, Any] = {}
    for record in records:
        if record.HasField("config"):
            updates.update(items(record.config.update))
    assert updates["lineage"] == {
        "quantize/k1": {"inputs": {"model": "m0"}, "path": "store/quantize/k1"},
        "rollouts/k2": {"inputs": {"quantize": "k1"}, "path": "store/rollouts/k2"},
    }
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_two_runs_of_one_process_stay_apart(tmp_path: Path) -> None:
    first, second = open_offline(tmp_path, name="a"), open_offline(tmp_path, name="b")
    first.metrics("evaluate", {"x": 1.0})
    second.metrics("evaluate", {"x": 2.0})
    first.finish()
    second.finish()
    found = {}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        records = wandb_records(path)
        (name,) = [record.run.display_name for record in records if record.HasField("run")]
        found[name] = [items(record.history.item)["evaluate/x"] for record in records if record.HasField("history")]
    assert found == {"a": [1.0], "b": [2.0]}


def test_an_offline_run_prints_nothing_and_writes_only_where_it_was_told(tmp_path: Path) -> None:
    program = (
        "from pmpd.tracking import open_tracker\n"
        f"t = open_tracker('offline', project='p', dir={str(tmp_path / 'runs')!r}, config={{}})\n"
        "t.metrics('s', {'x': 1}); t.table('s', 't', [{'a': 1}]); t.finish()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(Path(tracking.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
    assert list(tmp_path.glob("runs/wandb/offline-run-*"))
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_disabled_never_imports_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker("disabled", project="p", dir=str(tmp_path), config={})
    use_everything(tracker)
    assert isinstance(tracker, NullTracker)
    assert not list(tmp_path.iterdir())


def test_an_unknown_mode_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode='ofline': one of offline, online, disabled"):
        open_tracker("ofline", project="p", dir=str(tmp_path), config={})


def use_everything(tracker: tracking.Tracker) -> None:
    tracker.metrics("evaluate", {"x": 1.0})
    tracker.curve("search", "c", [{"bits": 2, "y": 1.0}])
    tracker.table("report", "t", [{"a": 1}])
    tracker.lineage("quantize", "k", {}, "p")
    tracker.finish()


def test_a_missing_wandb_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use_everything(open_offline(tmp_path))
    assert "W&B failed at start" in only_warning(caplog)
    assert "ModuleNotFoundError" in only_warning(caplog)


def test_an_init_that_fails_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("service is down")

    monkeypatch.setattr(wandb, "init", fail)
    use_everything(open_offline(tmp_path))
    assert "W&B failed at start" in only_warning(caplog)
    assert "CommError: service is down" in only_warning(caplog)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    use_everything(open_offline(tmp_path / "file"))
    assert "W&B failed at start" in only_warning(caplog)
    assert "file" in only_warning(caplog)


def test_online_without_a_login_is_kept_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use_everything(open_tracker("online", project="p", dir=str(tmp_path), config={}))
    assert "kept in" in only_warning(caplog)
    assert "wandb login" in only_warning(caplog)
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_w_and_b_is_waited_for_once_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    modes: list[str] = []

    def init(**given: Any) -> Any:
        modes.append(given["mode"])
        if given["mode"] == "online":
            raise TimeoutError("nobody answers")
        return _Breaks("nowhere")

    monkeypatch.setattr(wandb, "init", init)
    for _ in range(3):
        use_everything(open_tracker("online", project="p", dir=str(tmp_path), config={}))
    assert modes == ["online", "offline", "offline", "offline"]
    assert "later ones" in only_warning(caplog)


class _Breaks:
    """A run that breaks at one call and counts what comes after."""

    dir = "nowhere/files"
    offline = True

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0
        self.config = self

    def _call(self, name: str) -> None:
        self.calls += 1
        if name == self.at:
            raise BrokenPipeError("connection lost")

    def log(self, _: Any, **__: Any) -> None:
        self._call("log")

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._call("define_metric")

    def update(self, *_: Any, **__: Any) -> None:
        self._call("update")

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize(
    ("at", "named"),
    [
        ("log", "metrics of evaluate"),
        ("define_metric", "curve search/c"),
        ("update", "lineage of quantize"),
        ("finish", "finish"),
    ],
)
def test_a_run_that_breaks_in_the_middle_is_named_once_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str, named: str
) -> None:
    import wandb

    run = _Breaks(at)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = open_offline(tmp_path)
    use_everything(tracker)
    calls = run.calls
    use_everything(tracker)
    assert run.calls == calls
    assert f"W&B failed at {named}" in only_warning(caplog)
    assert "BrokenPipeError: connection lost" in only_warning(caplog)


def test_a_key_press_is_not_swallowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_offline(tmp_path)
