from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pmpd import tracking
from pmpd.tracking import Identity, NullTracker, open_tracker
from pmpd.version import code_version


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, settings or staging folder of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pmpd.tracking.tracker._unreachable", [])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def wandb_records(path: Path) -> list[Any]:
    """The protocol buffers of a finished run's file; W&B's service writes its end after ``finish`` has returned."""
    deadline = time.monotonic() + 20
    while not (records := read_records(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return records


def read_records(path: Path) -> list[Any]:
    """The protocol buffers of a .wandb file: a LevelDB log of 32 KiB blocks after a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, parts = path.read_bytes(), 7, [], b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a record's header: padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def open_offline(tmp_path: Path, **extra: Any) -> tracking.Tracker:
    config = {"model": {"name": "tiny"}, "seed": 0}
    return open_tracker("offline", project="pmpd-test", dir=str(tmp_path), config=config, **extra)


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
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 30
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


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    # W&B's own records stay in its debug.log: its logger does not propagate, but pytest listens to it.
    (record,) = [
        record
        for record in caplog.records
        if record.name.startswith("pmpd.tracking") and record.levelno >= logging.WARNING
    ]
    return record.getMessage()


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


def run_ids(folder: Path) -> list[str]:
    found = [wandb_records(path) for path in sorted(folder.glob("wandb/*run-*/*.wandb"))]
    return [record.run.run_id for records in found for record in records if record.HasField("run")]


def tell(folder: Path, run_id: str, content: str, *, end: bool = True) -> None:
    tracker = open_offline(folder, identity=Identity(run_id, content), job_type="quantize", group="sweep")
    tracker.metrics("quantize", {"x": 1.0})
    tracker.lineage(*run_id.split("-"), {"model": "source/m0", "sensitivity": "sensitivity/k0"}, "store/q")
    if end:
        tracker.finish()


def test_a_run_is_told_once_and_again_when_it_says_something_else(tmp_path: Path) -> None:
    tell(tmp_path, "quantize-k1", "k1")
    tell(tmp_path, "quantize-k1", "k1")
    assert run_ids(tmp_path) == ["quantize-k1"]
    (path,) = tmp_path.glob("wandb/*run-*/*.wandb")
    (run,) = [r.run for r in wandb_records(path) if r.HasField("run")]
    assert (run.job_type, run.run_group) == ("quantize", "sweep")
    tell(tmp_path, "quantize-k1", "k2")
    assert run_ids(tmp_path) == ["quantize-k1"]  # the earlier telling was not uploaded yet, so it is replaced
    next(tmp_path.glob("wandb/*run-*")).joinpath("run-quantize-k1.wandb.synced").touch()
    tell(tmp_path, "quantize-k1", "k3")
    assert len(list(tmp_path.glob("wandb/*run-*"))) == 2


def test_what_a_killed_process_had_told_of_a_run_is_told_anew(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pmpd.tracking import Identity, open_tracker\n"
        f"t = open_tracker('offline', project='pmpd-test', dir={str(tmp_path)!r}, config={{}}, "
        "identity=Identity('quantize-k1', 'k1'))\n"
        "t.metrics('quantize', {'x': 1.0}); os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    tell(tmp_path, "quantize-k1", "k1")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = [items(r.history.item) for r in wandb_records(path) if r.HasField("history")]
    assert [row["quantize/x"] for row in history] == [1.0]


def test_links_follow_lineage_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own calls, with a stand-in for the service: what is made, read and in which order."""
    tell(tmp_path, "sensitivity-k0", "k0")
    tell(tmp_path, "quantize-k1", "k1")
    calls: list[tuple[str, ...]] = []

    class Run:
        def __init__(self, run_id: str) -> None:
            self.id = run_id

        def use_artifact(self, what: Any) -> None:
            calls.append((self.id, "reads", what if isinstance(what, str) else what.name))

        def log_artifact(self, what: Any) -> None:
            (reference,) = (entry.ref for entry in what.manifest.entries.values())
            calls.append((self.id, "makes", what.name, what.type, reference))

        def finish(self) -> None:
            pass

    import wandb

    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "q").write_text("an artifact")
    monkeypatch.setattr(wandb, "init", lambda **given: Run(given["id"]))
    monkeypatch.chdir(tmp_path)
    assert tracking.link(str(tmp_path), "pmpd-test", None) == ["sensitivity-k0", "quantize-k1"]
    assert [c for c in calls if c[0] == "quantize-k1"] == [
        ("quantize-k1", "reads", "source-m0"),
        ("quantize-k1", "reads", "sensitivity-k0:latest"),
        ("quantize-k1", "makes", "quantize-k1", "quantize", (tmp_path / "store/q").as_uri()),
    ]
    assert tracking.link(str(tmp_path), "pmpd-test", None) == []


def test_an_old_ledger_and_an_input_that_was_never_told_do_not_stop_linking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell(tmp_path, "quantize-k1", "k1")  # it reads sensitivity-k0, of which no run tells
    old = tmp_path / "sent" / "pmpd-test" / "decide-k9.json"
    old.write_text(json.dumps({"content": "k9", "folder": "f"}))
    reads: list[str] = []

    class Run:
        def use_artifact(self, what: Any) -> None:
            if isinstance(what, str):
                raise ValueError(f"artifact {what} not found")
            reads.append(what.name)

        def log_artifact(self, what: Any) -> None:
            pass

        def finish(self) -> None:
            pass

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    assert tracking.link(str(tmp_path), "pmpd-test", None) == ["quantize-k1"]
    assert reads == ["source-m0", "sensitivity-k0"]
    assert "decide-k9" in only_warning(caplog)
