"""Jobs as processes of this machine: which GPUs each may see."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.engines import Local
from pipelines.jobs import State
from pmpd.config import LauncherConfig, LauncherKind, NeedsConfig


@dataclass(frozen=True)
class SaysItsGpus:
    """A job that writes the GPUs it may see and ends when it is told to."""

    folder: str
    name: str

    def __call__(self) -> None:
        said = Path(self.folder) / f"{self.name}.part"
        said.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        said.rename(said.with_suffix(".gpus"))
        while not (Path(self.folder) / f"{self.name}.end").exists():
            time.sleep(0.02)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_local_job_sees_only_the_gpus_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    config = LauncherConfig(name="local", kind=LauncherKind.local, folder=str(tmp_path))
    engine = Local(config, cpus=16, memory_gib=64, gpus=3)
    one, two = (NeedsConfig(cpus=1, gpus=n, memory_gib=1) for n in (1, 2))

    def gpus_of(name: str, needs: NeedsConfig) -> str:
        assert engine.has_room(needs)
        handles[name] = engine.submit(SaysItsGpus(str(tmp_path), name), needs)
        said = tmp_path / f"{name}.gpus"
        wait_for(said.exists)
        return said.read_text()

    handles = {}
    try:
        assert gpus_of("a", one) == "3"
        assert gpus_of("b", two) == "5,6"
        assert not engine.has_room(one)
        (tmp_path / "a.end").touch()
        wait_for(lambda: handles["a"].state() is State.ended)
        assert gpus_of("c", one) == "3"
    finally:
        for handle in handles.values():
            handle.cancel()
