"""One sweep on every engine that is here: the same artifacts and tables wherever its stages ran."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from pipelines import dispatch, squeue
from pipelines.multirun import run_grid
from tests.pipelines.cells import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "tests" / "slurm" / "cluster.sh"


def overrides(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *tiny(model),
        "tracking=disabled",
        "launcher.max_cpus=1",
        "launcher.max_memory_gib=4",
        f"launcher.folder={folder / 'jobs'}",
        f"store={folder / 'store'}",
        "scheduler=high,static",
        *more,
    ]


def numbers(out: Path) -> pd.DataFrame:
    frame = pd.read_csv(out / "results.csv")
    return frame[~frame.metric.str.startswith("latency")].reset_index(drop=True)


@pytest.fixture(scope="module")
def serial(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("serial")
    assert run_grid(overrides(tiny_llama, folder), folder / "report") == []
    return numbers(folder / "report")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of one node on loopback, from Debian's packages."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("needs submitit: pip install 'pmpd[slurm]'")
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs root, and Slurm: apt-get install slurm-wlm munge")
    home = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"SLURM_HOME": str(home)}
    subprocess.run([CLUSTER, "start"], env=environment, check=True, capture_output=True, timeout=120)
    yield home / "slurm.conf"
    subprocess.run([CLUSTER, "stop"], env=environment, check=True, capture_output=True, timeout=60)


def test_local_processes_give_what_one_process_gives(serial, tiny_llama, tmp_path):
    assert run_grid(overrides(tiny_llama, tmp_path, "launcher=local"), tmp_path / "report") == []
    pd.testing.assert_frame_equal(numbers(tmp_path / "report"), serial)
    assert list((tmp_path / "jobs").glob("quantize-*.log"))


@pytest.mark.slow
def test_slurm_jobs_give_what_one_process_gives_and_a_requeued_one_goes_on(
    serial, slurm, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    lines = overrides(tiny_llama, tmp_path, "launcher=slurm", "run_name=report")
    command = [sys.executable, "pipelines/run.py", "-m", *lines]
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        requeued = ""
        while not requeued and sweep.poll() is None and time.monotonic() < deadline:
            asked = subprocess.run(
                ["squeue", "--me", "--noheader", "--states=R", "--format=%A"], capture_output=True, text=True
            )
            if asked.stdout.split():
                requeued = asked.stdout.split()[0]
                subprocess.run(["scontrol", "requeue", requeued], check=True)
            time.sleep(0.2)
        assert requeued, (tmp_path / "log").read_text()[-2000:]
        assert sweep.wait(540) == 0, (tmp_path / "log").read_text()[-2000:]
    asked = subprocess.run(["scontrol", "show", "job", requeued], capture_output=True, text=True, check=True)
    assert "Restarts=1" in asked.stdout
    out = REPOSITORY / "outputs" / "paper" / "report"
    try:
        pd.testing.assert_frame_equal(numbers(out), serial)
    finally:
        shutil.rmtree(out)


@pytest.mark.slow
def test_what_slurm_can_never_run_ends_by_name_and_is_not_asked_again(slurm, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(squeue, "HOPELESS_S", 6.0)

    monkeypatch.setattr(dispatch.Dispatcher, "_refuse", lambda *_: pytest.fail("it is asked again"))

    def reason(*more: str) -> str:
        chosen = {m.partition("=")[0] for m in ("scheduler=", *more)}
        lines = [o for o in overrides(tiny_llama, tmp_path) if o.partition("=")[0] not in chosen]
        (missing,) = run_grid([*lines, "launcher=slurm", "scheduler=high", *more], tmp_path / "report")
        return missing.reason

    def partition(setting: str) -> None:
        subprocess.run(["scontrol", "update", "partitionname=all", setting], check=True)

    assert "never started; Slurm: PartitionConfig (asked for cpus=5000" in reason(
        "launcher.max_cpus=5000", "launcher.stages.sensitivity.cpus=5000"
    )
    assert "memory_gib=90000" in reason("launcher.max_memory_gib=null", "launcher.stages.sensitivity.memory_gib=90000")
    assert "unrecognized option" in reason("+launcher.options.nonsense=1")
    partition("MaxTime=5")
    try:
        assert "never started; Slurm: PartitionTimeLimit" in reason()
    finally:
        partition("MaxTime=INFINITE")
    asked = subprocess.run(["squeue", "--me", "--noheader"], capture_output=True, text=True, check=True)
    assert not asked.stdout, "what never started is cancelled"


@pytest.mark.slow
def test_a_partition_that_is_closed_for_a_while_is_waited_for(serial, slurm, tiny_llama, tmp_path, monkeypatch):
    """Slurm refuses jobs to a partition that is inactive; it is opened again after the first refusal."""
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(dispatch, "REFUSED_PAUSE_S", 1.0)
    refused: list[str] = []

    def open_again(self: dispatch.Dispatcher, job: dispatch.Job, words: str) -> None:
        refused.append(words)
        subprocess.run(["scontrol", "update", "partitionname=all", "State=UP"], check=True)
        refuse(self, job, words)

    refuse = dispatch.Dispatcher._refuse
    monkeypatch.setattr(dispatch.Dispatcher, "_refuse", open_again)
    subprocess.run(["scontrol", "update", "partitionname=all", "State=INACTIVE"], check=True)
    assert run_grid(overrides(tiny_llama, tmp_path, "launcher=slurm"), tmp_path / "report") == []
    assert refused
    assert "inactive" in refused[0]
    pd.testing.assert_frame_equal(numbers(tmp_path / "report"), serial)


@pytest.mark.slow
def test_ray_tasks_give_what_one_process_gives(serial, tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'pmpd[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # Stages ask for more than the machine has, and get what it has.
    lines = [o for o in overrides(tiny_llama, tmp_path, "launcher=ray") if not o.startswith("launcher.max_memory_gib")]
    assert run_grid(lines, tmp_path / "report") == []
    pd.testing.assert_frame_equal(numbers(tmp_path / "report"), serial)


def test_a_worker_that_is_killed_is_given_again_and_nothing_is_lost(serial, tiny_llama, tmp_path, monkeypatch):
    """kill -9 of the process that holds the lock of a stage, from outside, while the sweep runs."""
    import threading

    killed: list[int] = []

    def kill() -> None:
        from pmpd.locks import holder

        while not killed:
            for lock in (tmp_path / "store").glob("rollouts/*.0.lock"):
                held = holder(lock.parent, lock.name.partition(".")[0])
                if held is not None and isinstance(held["pid"], int) and held["pid"] != os.getpid():
                    os.kill(held["pid"], signal.SIGKILL)
                    killed.append(held["pid"])
            time.sleep(0.002)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert run_grid(overrides(tiny_llama, tmp_path, "launcher=local"), tmp_path / "report") == []
    assert killed
    thread.join(5)
    pd.testing.assert_frame_equal(numbers(tmp_path / "report"), serial)
