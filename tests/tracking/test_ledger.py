"""A run is told once, whichever process tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pmpd import tracking
from tests.tracking.offline import items, tell, wandb_records


def run_ids(folder: Path) -> list[str]:
    found = [wandb_records(path) for path in sorted(folder.glob("wandb/*run-*/*.wandb"))]
    return [record.run.run_id for records in found for record in records if record.HasField("run")]


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
