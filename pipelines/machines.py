"""What a cell's hardware gives it: the recipes of times and gains, and which machine's times a plan reads.

Times are keyed by the machine that they were measured on, with the code that was timed. A plan is of the machine at
hand where it can be, else of one that the store has a record of: so a report finds a GPU's times without a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

import pmpd
from pmpd.artifacts import Input, Node, Store
from pmpd.config import Config, ConfigError, GpuConfig, HardwareConfig, NpuConfig
from pmpd.hardware import machine
from pmpd.hardware.npu import NPU
from pmpd.records import FP16_BITS
from pmpd.stages import RuntimeConfig
from pmpd.stages.measure import ESTIMATE, GAIN, EstimateConfig, GainConfig
from pmpd.stages.timing import LATENCY, LINEARS, LatencyConfig, LinearsConfig

LIBRARY = Path(pmpd.__file__).parent
TIMED_CODE = ("kernels", "decode", "quant")


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


@dataclass(frozen=True)
class Measured:
    """What a cell's times and gains are of.

    Attributes:
        levels: the cell's precisions, falling.
        runtime: of its evaluation; times of a GPU are on that whatever it says.
        dense_sparse: the model that was evaluated where it is not ``nested``.
        outliers: the model that was evaluated if it has outliers, as the input that says their bits.
    """

    model: Input
    nested: Node
    evaluation: Node
    levels: tuple[int, ...]
    runtime: RuntimeConfig
    dense_sparse: Node | None = None
    outliers: Mapping[str, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Measures:
    """A cell's gain on its hardware, the time of a decode step, and of the linear layers on a GPU."""

    gain: Node
    latency: Node
    linears: Node | None


def measures(config: Config, store: Store, of: Measured, *, reading: bool) -> Measures:
    """The recipes of what a cell's hardware gives it.

    Raises:
        ConfigError: as :func:`timed`, and outliers on a GPU, where products with them would be of dequantised weights.
    """
    hardware, budget, quantizer = config.hardware, config.budget, config.quantizer
    on_gpu = isinstance(hardware, GpuConfig)
    runtime = of.runtime.on_gpu() if on_gpu else of.runtime
    bits = [FP16_BITS, *of.levels]
    uniform = config.scheduler.bits
    if on_gpu and uniform is not None and uniform not in bits:  # a gain needs the time of every step that was taken
        bits = sorted([*bits, uniform], reverse=True)

    def latency(machine: str) -> Node:
        timing = LatencyConfig(bits, list(budget.timing_contexts), budget.timing_tokens, None, runtime, machine)
        return LATENCY.node(timing, model=of.model, nested=of.nested)

    steps = timed(store, runtime.device, latency, reading=reading)
    if not isinstance(hardware, GpuConfig):
        estimate = EstimateConfig(
            npu=dataclasses.asdict(hardware),
            parent_bits=quantizer.parent_bits if of.dense_sparse is None else of.levels[-1],
            group_size=quantizer.group_size,
            trust_remote_code=config.model.trust_remote_code,
            resamples=budget.bootstrap_resamples,
            seed=config.seed,
        )
        return Measures(ESTIMATE.node(estimate, evaluation=of.evaluation, model=of.model, **of.outliers), steps, None)
    if of.outliers:
        raise ConfigError(f"hardware={hardware.name} is not possible: no GPU kernel reads outliers; npu_4k estimates")
    forwards = hardware.linear_forwards

    def linears(machine: str) -> Node:
        timing = LinearsConfig(None, bits, quantizer.group_size, forwards, runtime.dtype, machine)
        return LINEARS.node(timing, model=of.model)

    gain = GainConfig(of.levels[0], budget.bootstrap_resamples, config.seed)
    return Measures(
        GAIN.node(gain, evaluation=of.evaluation, latency=steps),
        steps,
        timed(store, "cuda", linears, reading=reading),
    )


def here(device: str) -> str | None:
    """What times on ``device`` would be of: the machine, and a digest of the code that they time. None without one."""
    if device != "cpu" and not torch.cuda.is_available():
        return None
    return f"{machine(device)}, code {_code()}"


@cache
def _code() -> str:
    """Of the kernels and the decode loop: a time is of these."""
    files = sorted(f for part in TIMED_CODE for f in (LIBRARY / part).glob("*") if f.suffix in (".py", ".cu"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]


def timed(store: Store, device: str, node: Callable[[str], Node], *, reading: bool) -> Node:
    """The node of the machine at hand; of another that the store has a record of where this one has none and cannot
    or, ``reading`` only, shall not make it.

    Args:
        device: ``cuda`` or ``cpu``, where the times are of.
        node: the recipe for a machine's name.

    Raises:
        ConfigError: times of a GPU, and neither one here nor a record of one.
    """
    now = here(device)
    own = node(now or "")
    if now is not None and store.status(own) == "cached":
        return own
    wanted = {k: v for k, v in own.config.items() if k != "machine"}
    recorded = sorted(
        config["machine"]  # in one order for every stage, so that the times of a table are of one machine
        for config in store.configs(own.stage)
        if {k: v for k, v in config.items() if k != "machine"} == wanted
        and store.status(node(config["machine"])) == "cached"
    )
    if recorded and (reading or now is None):
        return node(recorded[0])
    if now is None:
        raise ConfigError(
            f"{own.stage}: times of a GPU, but PyTorch sees no CUDA device and the store has no record of one; run "
            "this where there is one, or take an estimate, such as hardware=npu_4k"
        )
    return own
