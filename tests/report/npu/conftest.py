from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from pipelines.grid import CONF
from pipelines.machines import npu_of
from pipelines.schema import register
from pmpd.config import from_omegaconf
from pmpd.hardware.npu import NPU


@pytest.fixture(scope="session")
def npus() -> list[NPU]:
    """The machines of ``experiment=npu``, from their configuration files."""
    register()
    names = ("npu_16k", "npu_4k", "flightllm_vhk158")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [npu_of(from_omegaconf(compose("config", overrides=[f"hardware={n}"])).hardware) for n in names]
