"""The product with a nested weight on an NVIDIA GPU.

``device.py`` has the storage, ``launch.py`` the sizes of launches, ``nested_*.cu`` the kernels. Nothing here knows
layers or models.

The design. A table's entries are 16-bit integers of their row's scale and offset, kept as high and low bytes; an input
is a 16-bit integer of the scale of its part of the columns, kept as two signed base-256 digits. ``prmt`` (byte
permute) looks up four weights' bytes in a table that lies in registers, and its result is an operand of the integer
tensor cores as it stands: nothing is converted, sums are exact, and the eight columns of an ``mma`` hold the digits of
four rows of x for the price of one. At 4 bits a row has two tables of eight entries; ``prmt`` yields zero for the
wrong one (its sign mode, on digits of seven bits), and the tensor cores add both. From 5 bits on entries are looked up
in shared memory.

Integer instructions a weight (of the machine code for sm_90; an H100 at its memory ceiling of 3.0 TB/s has time for
1.2 / 1.8 / 2.5 at 2 / 3 / 4 bits): permutes 0.5 / 0.5 / 1.0, selectors (shift, mask, merge) 0.3 / 0.5 / 0.8. Bytes a
weight: b / 8, and nothing else of the planes is read.

Where programs may overlap (compute capability 9.0 on), weights are asked for while the kernel before still computes
("programmatic dependent launch"). Weights must therefore not be written by the kernels just before; ``prepare`` waits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional

from pmpd.kernels import launch, nvrtc
from pmpd.kernels.device import TILE, UNIT, DeviceWeight, prepare
from pmpd.kernels.errors import CudaUnavailableError
from pmpd.kernels.launch import MAX_ROWS, Launch
from pmpd.kernels.reference import WORD_BITS

__all__ = ["MAX_ROWS", "DeviceWeight", "dequantize", "matmul", "prepare"]

MAX_LAUNCHED_ROWS = 32
"""Rows of x up to which launches of ``MAX_ROWS`` are taken; above, the weight is decoded for the tensor cores."""
DECODED_WEIGHTS = 1 << 25
"""Weights decoded at a time for many rows of x: 64 MiB."""
MIN_CAPABILITY = (8, 0)
SOURCES = ("nested_weight.cu", "nested_input.cu", "nested_matmul.cu")
"""One program in this order."""
PLAIN, NORM, GATE_UP = 0, 1, 2
"""What a kernel does to x first."""


def matmul(
    x: Tensor,
    weight: DeviceWeight,
    bits: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    gate_up: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``f(x) @ W.T + bias + residual`` with W the weight at ``bits`` bits, on the current stream.

    Args:
        x: ``[..., in]``, or ``[..., 2 * in]`` with ``gate_up``; of the weight's dtype.
        norm_weight: ``[in]``: f is RMSNorm, ``x * rsqrt(mean(x**2) + norm_eps) * norm_weight``.
        gate_up: f is ``silu(gate) * up`` of the two halves of x (SwiGLU, Shazeer, 2020).
        residual: ``[..., out]``.
        bias: ``[out]``.
        out: where to write, ``[..., out]``, contiguous; it may be ``residual``. Not differentiable, nor traceable.

    Returns:
        ``[..., out]``: norm of the error over norm of the result under 2e-3 in float16, 1e-2 in bfloat16. If a row of x
        is not finite, neither is its output.

    Raises:
        ValueError: bits that the weight has not, or tensors that do not fit it.
        CudaUnavailableError: a GPU or an installation that cannot run the kernels; the message names the fix.
    """
    if bits not in weight.tables:
        raise ValueError(f"bits={bits} is not available; this weight has {sorted(weight.tables)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight was prepared for {weight.dtype}")
    _check_features(x, weight.in_features, weight.out_features, gate_up)
    if out is None:  # written out: torch.compile traces it
        return torch.ops.pmpd.nested_matmul(
            x,
            weight.packed,
            weight.tables[bits],
            weight.scales[bits],
            bits,
            weight.out_features,
            weight.in_features,
            weight.group_size or 0,
            norm_weight,
            norm_eps,
            gate_up,
            residual,
            bias,
        )
    _multiply(x, _operand(weight, bits), _Fused(norm_weight, norm_eps, gate_up, residual, bias), out)
    return out


@torch.library.custom_op("pmpd::nested_matmul", mutates_args=(), device_types="cuda")
def _nested_matmul(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    scales: Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    gate_up: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As :func:`matmul`, on the tensors of a :class:`DeviceWeight`; ``group_size`` 0 for whole rows."""
    out = x.new_empty(*x.shape[:-1], out_features)
    operand = _Operand(packed, table, scales, bits, out_features, in_features, group_size)
    _multiply(x, operand, _Fused(norm_weight, norm_eps, gate_up, residual, bias), out)
    return out


@_nested_matmul.register_fake
def _(x, packed, table, scales, bits, out_features, *rest, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


def dequantize(weight: DeviceWeight, bits: int) -> Tensor:
    """``[out, in]`` at ``bits`` bits, in the weight's dtype.

    Raises:
        ValueError, CudaUnavailableError: as :func:`matmul`.
    """
    if bits not in weight.tables:
        raise ValueError(f"bits={bits} is not available; this weight has {sorted(weight.tables)}")
    out = torch.empty(weight.out_features, weight.in_features, dtype=weight.dtype, device=weight.packed.device)
    _decode(_operand(weight, bits), 0, out)
    return out


@dataclass(frozen=True)
class _Operand:
    """A :class:`DeviceWeight` at one precision."""

    packed: Tensor
    table: Tensor
    scales: Tensor
    bits: int
    out_features: int
    in_features: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.table.shape[1]


@dataclass(frozen=True)
class _Fused:
    """What :func:`matmul` does beside the product."""

    norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    gate_up: bool = False
    residual: Tensor | None = None
    bias: Tensor | None = None

    @property
    def prologue(self) -> int:
        return NORM if self.norm_weight is not None else GATE_UP if self.gate_up else PLAIN


def _operand(weight: DeviceWeight, bits: int) -> _Operand:
    table, scales = weight.tables[bits], weight.scales[bits]
    return _Operand(weight.packed, table, scales, bits, weight.out_features, weight.in_features, weight.group_size or 0)


def _multiply(x: Tensor, weight: _Operand, fused: _Fused, out: Tensor) -> None:
    _check(x, weight, fused, out)
    rows = x.numel() // x.shape[-1]
    flat, target = _aligned(x.reshape(rows, -1)), out.view(rows, -1)
    residual = None if fused.residual is None else fused.residual.reshape(rows, -1)
    norm_weight = None if fused.norm_weight is None else _aligned(fused.norm_weight)
    with torch.cuda.device(x.device):
        if rows > MAX_LAUNCHED_ROWS:
            if residual is not None and _share_storage(residual, target):
                residual = residual.clone()  # the product is written before anything is added to it
            _multiply_with_tensor_cores(_before(flat, fused), weight, target)
            for term in (fused.bias, residual):
                if term is not None:
                    target += term
            return
        first = 0
        while first < rows:
            rest = None if residual is None else residual[first:]
            part = _Fused(norm_weight, fused.norm_eps, fused.gate_up, rest, fused.bias)
            first += _launch(flat[first:], weight, part, target[first:])


def _check_features(x: Tensor, in_features: int, out_features: int, gate_up: bool) -> None:
    expected = in_features * (1 + gate_up)
    if x.shape[-1] != expected:
        gated = f" (gate and up, {in_features} each)" if gate_up else ""
        raise ValueError(
            f"x has {x.shape[-1]} features; the weight [{out_features}, {in_features}] takes {expected}{gated}"
        )


def _check(x: Tensor, weight: _Operand, fused: _Fused, out: Tensor) -> None:
    in_features = weight.in_features
    _check_features(x, in_features, weight.out_features, fused.gate_up)
    tiles = weight.table.shape[0]
    num_planes, rest = divmod(weight.packed.numel() * WORD_BITS, in_features * tiles * TILE)
    if rest or num_planes < weight.bits or weight.scales.shape[0] != tiles * TILE:
        raise ValueError(f"planes, tables and scales are not those of a weight [{weight.out_features}, {in_features}]")
    if fused.norm_weight is not None and fused.gate_up:
        raise ValueError("norm_weight and gate_up exclude each other")
    result = (*x.shape[:-1], weight.out_features)
    expected = {
        "norm_weight": (fused.norm_weight, (in_features,)),
        "bias": (fused.bias, (weight.out_features,)),
        "residual": (fused.residual, result),
        "out": (out, result),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {list(shape)} of {x.dtype} on {x.device}, got {got}")
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def _launch(x: Tensor, weight: _Operand, fused: _Fused, out: Tensor, plan: Launch | None = None) -> int:
    """Multiply as many of x's rows as one launch can, and return their number. ``plan`` is for sweeps."""
    in_features = x.shape[1] // 2 if fused.gate_up else x.shape[1]
    processors, shared = _device(x.device.index)
    shape = (weight.bits, weight.out_features, in_features)
    rows = min(x.shape[0], MAX_ROWS)
    plan = plan or launch.choose(weight.out_features, in_features, weight.bits, rows, processors)
    plan = launch.fit(plan, *shape, weight.groups, rows, processors, shared)
    needed = plan.shared_bytes(*shape, weight.groups)
    if plan.alone:
        needed = max(needed, min(launch.ALONE_SHARED_BYTES, shared - launch.STATIC_SHARED_BYTES))
    module = _module(
        weight.bits,
        plan.capacity,
        x.dtype,
        fused.prologue,
        weight.groups > 1,
        plan.stages,
        in_features % launch.STEP != 0,
        plan.once(in_features),
    )
    module["nested_matmul"](
        (plan.blocks,),
        (plan.threads,),
        x,
        weight.packed,
        weight.table,
        weight.scales,
        out,
        fused.norm_weight,
        None if fused.residual is None else fused.residual.contiguous(),
        None if fused.bias is None else fused.bias.contiguous(),
        float(fused.norm_eps),
        plan.rows,
        weight.out_features,
        in_features,
        weight.group_size or in_features,
        weight.groups,
        plan.splits,
        plan.early,
        int(plan.late),
        shared_bytes=needed,
        programmatic=True,
    )
    return plan.rows


def _multiply_with_tensor_cores(x: Tensor, weight: _Operand, out: Tensor) -> None:
    """``x @ W.T`` for many rows: parts of the weight decoded to half precision, each multiplied by cuBLAS."""
    at_once = max(1, DECODED_WEIGHTS // (TILE * x.shape[1])) * TILE
    decoded = x.new_empty(min(at_once, weight.out_features), x.shape[1])
    for first in range(0, weight.out_features, at_once):
        part = decoded[: weight.out_features - first]
        _decode(weight, first, part)
        out[:, first : first + at_once] = x @ part.T


def _decode(weight: _Operand, first_row: int, out: Tensor) -> None:
    """Rows of the weight from ``first_row`` (a multiple of 16) on into ``out`` ``[rows, in]``."""
    rows, in_features = out.shape
    warps = 4
    with torch.cuda.device(out.device):
        module = _module(weight.bits, 1, out.dtype, PLAIN, weight.groups > 1, 1, in_features % launch.STEP != 0, True)
        module["dequantize"](
            (-(-in_features // (warps * UNIT)), -(-rows // TILE)),
            (32 * warps,),
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


def _before(x: Tensor, fused: _Fused) -> Tensor:
    """What the kernels do to x, by PyTorch."""
    if fused.norm_weight is not None:
        return functional.rms_norm(x.float(), x.shape[1:], fused.norm_weight.float(), fused.norm_eps).to(x.dtype)
    if fused.gate_up:
        gate, up = x.float().chunk(2, dim=1)
        return (functional.silu(gate) * up).to(x.dtype)
    return x


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as vector loads need."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.cache
def _module(
    bits: int, rows: int, dtype: torch.dtype, prologue: int, grouped: bool, stages: int, ragged: bool, once: bool
) -> nvrtc.Module:
    source = "".join(resources.files("pmpd.kernels").joinpath(name).read_text() for name in SOURCES)
    choices = {
        "BITS": bits,
        "ROWS": rows,
        "BFLOAT": int(dtype == torch.bfloat16),
        "PROLOGUE": prologue,
        "GROUPED": int(grouped),
        "STAGES": stages,
        "RAGGED": int(ragged),
        "ONCE": int(once),
    }
    return nvrtc.compile(source, [f"-D{name}={value}" for name, value in choices.items()])


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Processors and shared memory of a block, in bytes."""
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < MIN_CAPABILITY:
        raise CudaUnavailableError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}; the kernels for nested "
            f"weights need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or later: use device=cpu"
        )
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
