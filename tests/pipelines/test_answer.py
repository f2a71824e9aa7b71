"""What ends a run: Ctrl-C wherever it falls, and what goes wrong in a callback of Hydra's."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from omegaconf import OmegaConf

from pipelines.answer import answered
from pipelines.grid import CONF
from pipelines.tune import RESULTS


class Deaf:
    """Interrupted while it goes, where Python raises nothing."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_where_nothing_can_be_raised_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards
    reached = []

    def main() -> None:
        Deaf()
        time.sleep(5)
        reached.append("the end")

    try:
        with pytest.raises(SystemExit) as ended:
            answered(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert not reached
    assert [r.getMessage() for r in caplog.records] == ["interrupted; the same command goes on from here"]
    assert "Traceback" not in capfd.readouterr().err


def test_what_else_is_lost_there_is_still_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __del__(self) -> None:
            raise TypeError("a bug of somebody's")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's makes a warning of it
    answered(Broken)
    assert "TypeError: a bug of somebody's" in capfd.readouterr().err
    assert sys.unraisablehook is sys.__unraisablehook__


BROKEN = """
import os, sys
os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # conf/ is found from the script's file, as when it is one
from pipelines import multirun, run
from pipelines.answer import answered

def broken(*_):
    raise TypeError("a bug of ours")

multirun.{name} = broken
answered(run.main)
"""


@pytest.mark.parametrize("name", ["run_grid", "WholeSweep.__init__"])
def test_a_bug_in_a_sweep_ends_it_with_its_traceback(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", BROKEN.format(name=name), "-m", "seed=0,1", "model.low_bits=7"]
    command += [f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "in broken\n" in done.stderr
    assert "TypeError: a bug of ours\n" in done.stderr
    assert done.stdout == ""  # where Hydra's own loop would say that it begins


def test_a_search_whose_choice_fails_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit, match="1"):
        Callbacks(
            OmegaConf.create({"hydra": {"callbacks": {"it": {"_target_": "pipelines.tune.Chosen"}}}})
        ).on_multirun_end(config)
    assert RESULTS in capfd.readouterr().err
