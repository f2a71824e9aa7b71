"""Lineage becomes links between artifacts after a sync, once: W&B's own calls, with a stand-in for the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pmpd import tracking
from tests.tracking.offline import only_warning, tell


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
