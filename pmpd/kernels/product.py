"""Launches of the kernels in ``nested_*.cu``: a product with few rows, and a weight decoded for many.

``launch.py`` says how large a launch is. Arguments are taken as they come: ``cuda.py`` checks them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from pmpd.kernels import launch, nvrtc
from pmpd.kernels.device import BYTE_BITS, TILE, UNIT, DeviceWeight
from pmpd.kernels.errors import CudaUnavailableError
from pmpd.kernels.launch import MAX_ROWS, Launch

MIN_CAPABILITY = (8, 0)
LOOKUP = (
    "cluster.cu",
    "nested_weight.cu",
    "nested_lookup.cu",
    "nested_input.cu",
    "nested_matmul.cu",
    "nested_decode.cu",
)
"""One program in this order: products by look-up, and the weight decoded."""
PLANES = ("cluster.cu", "nested_weight.cu", "nested_planes.cu", "nested_input.cu", "nested_matmul.cu")
"""Products by bit planes."""
DECODE_WARPS = 4


@dataclass(frozen=True)
class Operand:
    """A :class:`DeviceWeight` at one precision; ``group_size`` is 0 for whole rows.

    ``bytes_at_2``: as the weight has them, at 2 bits alone; for several rows of x by look-up.
    """

    packed: Tensor
    table: Tensor
    scales: Tensor
    bits: int
    out_features: int
    in_features: int
    group_size: int
    bytes_at_2: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, weight: DeviceWeight, bits: int) -> Operand:
        """``weight`` at ``bits`` bits, which it has."""
        shape = (weight.out_features, weight.in_features, weight.group_size or 0)
        bytes_at_2 = weight.bytes_at_2 if bits == BYTE_BITS else None
        return cls(weight.packed, weight.tables[bits], weight.scales[bits], bits, *shape, bytes_at_2)

    @property
    def groups(self) -> int:
        return self.table.shape[1]


@dataclass(frozen=True)
class Fused:
    """What a product does beside multiplying, as :func:`pmpd.kernels.cuda.matmul` says."""

    norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    gated: bool = False
    residual: Tensor | None = None
    bias: Tensor | None = None


def multiply(x: Tensor, weight: Operand, fused: Fused, out: Tensor, plan: Launch | None = None) -> int:
    """Multiply as many of x's rows as one launch can, and return their number.

    Args:
        x: ``[rows, in]``, contiguous, 16-byte aligned, as ``fused.norm_weight`` is.
        out: ``[rows, out]``, or half as wide if gated.
        plan: to measure or test one; planes only up to 4 bits and without groups.
    """
    gpu = describe(x.device.index)
    bits, shape = weight.bits, (weight.out_features, weight.in_features)
    rows = min(x.shape[0], MAX_ROWS)
    plan = plan or _plan(weight, fused, rows, gpu)
    assert not plan.planes or (weight.groups == 1 and bits <= launch.PLANES_MAX_BITS)
    plan = launch.fit(plan, bits, *shape, weight.groups, rows, gpu.processors, gpu.shared_bytes)
    bytes_at_2 = weight.bytes_at_2
    variant = Variant.of(plan, bits, x.dtype, fused, shape, weight.groups, of_bytes=bytes_at_2 is not None)
    table, scales = bytes_at_2 if bytes_at_2 and variant.table_digits == 1 else (weight.table, weight.scales)
    module = _module(gpu.capability, variant)
    module["nested_matmul"](
        (plan.blocks,),
        (32, plan.splits // plan.cluster, plan.teams),
        x,
        weight.packed,
        table,
        scales,
        out,
        fused.norm_weight,
        None if fused.residual is None else fused.residual.contiguous(),
        None if fused.bias is None else fused.bias.contiguous(),
        float(fused.norm_eps),
        plan.rows,
        weight.out_features,
        weight.in_features,
        weight.group_size or weight.in_features,
        weight.groups,
        plan.most_tiles(shape[0]),
        plan.kept_steps(shape[1]),
        plan.hold,
        plan.early,
        plan.late,
        shared_bytes=max(plan.shared_bytes(bits, *shape, weight.groups), _reserved_bytes(plan, fused, gpu)),
        programmatic=True,
        cluster=plan.cluster,
    )
    return plan.rows


def _plan(weight: Operand, fused: Fused, rows: int, gpu: Gpu) -> Launch:
    in_chain = gpu.clusters and rows == 1 and (fused.norm_weight is not None or fused.residual is not None)
    return launch.choose(
        weight.out_features,
        weight.in_features,
        weight.bits,
        rows,
        gpu.processors,
        chain=in_chain,
        planes=gpu.binary and weight.groups == 1,
        clusters=gpu.clusters,
    )


def _reserved_bytes(plan: Launch, fused: Fused, gpu: Gpu) -> int:
    """In a block of a model, products that add a residual and products that begin with a norm take turns."""
    if plan.alone or fused.residual is not None:
        return launch.reserved_bytes(gpu.shared_bytes, alone=True)
    return launch.reserved_bytes(gpu.shared_bytes, alone=False) if fused.norm_weight is not None else 0


def decode(weight: Operand, first_row: int, out: Tensor) -> None:
    """Rows of the weight from ``first_row`` (a multiple of 16) on into ``out`` ``[rows, in]``."""
    rows, in_features = out.shape
    with torch.cuda.device(out.device):
        ragged = in_features % launch.STEP != 0
        variant = Variant(weight.bits, 1, out.dtype, grouped=weight.groups > 1, ragged=ragged)
        module = _module(describe(out.device.index).capability, variant)
        module["dequantize"](
            (-(-in_features // (DECODE_WARPS * UNIT)), -(-rows // TILE)),
            (32 * DECODE_WARPS,),
            weight.packed,
            weight.table,
            weight.scales,
            out,
            weight.out_features,
            in_features,
            weight.group_size or in_features,
            weight.groups,
            first_row // TILE,
            first_row + rows,
        )


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    capability: compute capability.
    processors: their number.
    shared_bytes: most shared memory of a block.
    """

    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def clusters(self) -> bool:
        """Whether blocks can form clusters, and kernels start while others end."""
        return self.capability >= nvrtc.PROGRAMMATIC_CAPABILITY

    @property
    def binary(self) -> bool:
        """Whether its tensor cores multiply bits: Hopper's do (measured), Ampere's and Ada's should (specified)."""
        return self.capability[0] in (8, 9)


@functools.cache
def describe(index: int) -> Gpu:
    """The GPU ``index``.

    Raises:
        CudaUnavailableError: it is older than the kernels' instructions.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < MIN_CAPABILITY:
        raise CudaUnavailableError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}; the kernels for nested "
            f"weights need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or later: use device=cpu"
        )
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Gpu(capability, properties.multi_processor_count, shared_bytes)


@dataclass(frozen=True)
class Variant:
    """What a program is compiled for, as ``nested_weight.cu`` says; ``planes``: which method."""

    bits: int
    rows: int
    dtype: torch.dtype
    norm: bool = False
    gated: bool = False
    grouped: bool = False
    stages: int = 1
    whole: bool = False
    ragged: bool = False
    chunk: int = 1
    once: bool = True
    max_threads: int = 512
    planes: bool = False
    cluster: int = 1
    table_digits: int = 2
    spread: bool = False

    @classmethod
    def of(
        cls,
        plan: Launch,
        bits: int,
        dtype: torch.dtype,
        fused: Fused,
        shape: tuple[int, int],
        groups: int,
        *,
        of_bytes: bool = True,
    ) -> Variant:
        """For a launch that :func:`launch.fit` returned.

        Args:
            shape: outputs and inputs of the weight.
            of_bytes: whether the weight has tables of bytes, if it can.
        """
        may_have_bytes = bits == BYTE_BITS and groups == 1 and plan.capacity > 1
        in_features = shape[1]
        chunk, once = plan.chunk(in_features, norm=fused.norm_weight is not None)
        return cls(
            bits,
            plan.capacity,
            dtype,
            norm=fused.norm_weight is not None,
            gated=fused.gated,
            grouped=groups > 1,
            stages=plan.stages,
            whole=plan.whole(*shape),
            ragged=in_features % launch.STEP != 0,
            chunk=chunk,
            once=once,
            max_threads=32 * plan.max_warps,
            planes=plan.planes,
            cluster=plan.cluster,
            table_digits=1 if of_bytes and may_have_bytes else 2,
            spread=plan.spreads(bits, in_features, groups),
        )

    @property
    def source(self) -> str:
        """The program, CUDA C++."""
        names = PLANES if self.planes else LOOKUP
        return "".join(resources.files("pmpd.kernels").joinpath(name).read_text() for name in names)

    @property
    def options(self) -> list[str]:
        """For the compiler."""
        choices = {
            "BITS": self.bits,
            "ROWS": self.rows,
            "BFLOAT": self.dtype == torch.bfloat16,
            "NORM": self.norm,
            "GATED": self.gated,
            "GROUPED": self.grouped,
            "STAGES": self.stages,
            "WHOLE": self.whole,
            "RAGGED": self.ragged,
            "CHUNK": self.chunk,
            "ONCE": self.once,
            "MAX_THREADS": self.max_threads,
            "CLUSTER": self.cluster,
            "TABLE_DIGITS": self.table_digits,
            "SPREAD": self.spread,
            "FIXED_BYTES": launch.fixed_bytes(self.rows, self.max_threads // 32, self.cluster),
        }
        return [f"-D{name}={int(value)}" for name, value in choices.items()]


@functools.cache
def _module(capability: tuple[int, int], variant: Variant) -> nvrtc.Module:
    """For the current device, whose ``capability`` is part of the cache's key."""
    return nvrtc.compile(variant.source, variant.options)
