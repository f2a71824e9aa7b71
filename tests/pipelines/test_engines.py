"""Engines: which GPUs a process of this machine may see, and what is said where an engine's package is not there."""

from __future__ import annotations

import os
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.engines import Local, open_engine
from pipelines.jobs import State
from pmpd.config import ConfigError, LauncherConfig, LauncherKind, NeedsConfig


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


@pytest.mark.parametrize(("kind", "package"), [(LauncherKind.ray, "ray"), (LauncherKind.slurm, "submitit")])
def test_an_engine_without_its_package_names_the_extra_that_has_it(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'pmpd\[(\w+)\]'") as error:
        open_engine(LauncherConfig(name=kind.value, kind=kind, folder=str(tmp_path)))
    extra = re.search(r"pmpd\[(\w+)\]", str(error.value))[1]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(re.match(rf"{package}\b", needed) for needed in project["optional-dependencies"][extra])
