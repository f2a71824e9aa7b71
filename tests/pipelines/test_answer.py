"""What goes wrong in a callback of Hydra's ends a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from omegaconf import OmegaConf

from pipelines.grid import CONF
from pipelines.tune import RESULTS

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
