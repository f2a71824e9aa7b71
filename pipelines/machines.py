"""Hardware of a configuration: what is impossible of it, and which machine's times a plan reads.

Times are keyed by the machine that they were measured on. A plan is of the machine at hand where it can be, else of
one that the store has a record of: so a report finds a GPU's times without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from pmpd.artifacts import Node, Store
from pmpd.config import ConfigError, HardwareConfig, NpuConfig
from pmpd.hardware import machine
from pmpd.hardware.npu import NPU


def check_hardware(hardware: HardwareConfig) -> None:
    """Refuse constants that no machine can have.

    Raises:
        ConfigError: a number outside its range.
    """
    if isinstance(hardware, NpuConfig):
        npu_of(hardware)


def npu_of(hardware: HardwareConfig) -> NPU:
    """The NPU that a configuration describes.

    Raises:
        ConfigError: a number outside its range, or hardware that is no NPU.
    """
    if not isinstance(hardware, NpuConfig):
        raise ConfigError(f"hardware={hardware.name} is not possible: an NPU, such as npu_4k")
    try:
        return NPU(**dataclasses.asdict(hardware))
    except ValueError as error:
        raise ConfigError(f"hardware.{error}") from error


def timed(store: Store, device: str, node: Callable[[str], Node], *, reading: bool) -> Node:
    """The node of the machine at hand; of another that the store has a record of where this one has none and cannot
    or, ``reading`` only, shall not make it.

    Args:
        device: ``cuda`` or ``cpu``, where the times are of.
        node: the recipe for a machine's name.

    Raises:
        ConfigError: times of a GPU, and neither one here nor a record of one.
    """
    here = machine(device) if device == "cpu" or torch.cuda.is_available() else None
    own = node(here or "")
    if here is not None and store.status(own) == "cached":
        return own
    wanted = {k: v for k, v in own.config.items() if k != "machine"}
    recorded = [
        found
        for config in store.configs(own.stage)
        if {k: v for k, v in config.items() if k != "machine"} == wanted
        and store.status(found := node(config["machine"])) == "cached"
    ]
    if recorded and (reading or here is None):
        return recorded[0]
    if here is None:
        raise ConfigError(
            f"{own.stage}: times of a GPU, but PyTorch sees no CUDA device and the store has no record of one; run "
            "this where there is one, or take an estimate, such as hardware=npu_4k"
        )
    return own
