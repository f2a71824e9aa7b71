"""The product with a nested weight on an NVIDIA GPU.

``device.py`` has the storage, ``product.py`` the launches, ``nested_*.cu`` the kernels. Nothing here knows layers or
models.

An input is a 16-bit integer of the scale of its part of the columns, so sums are exact. Two methods, each with its
integer tensor-core instruction, of which ``launch.choose`` takes the faster; ``docs/kernels.md`` has counts and times.

By look-up: a table's entries are 16-bit integers of their row's scale and offset, kept as high and low bytes, an input
two signed base-256 digits. ``prmt`` (byte permute) looks up four weights' bytes in a table that lies in registers, and
its result is an operand as it stands. The eight columns of an ``mma`` hold the digits of four rows of x for the price
of one. At 4 and 5 bits a row has two and four tables of eight entries; ``prmt`` yields zero for the wrong ones (its
sign mode, on digits of seven bits), and the tensor cores add all. From 6 bits on entries are looked up in shared
memory. Several rows of x have entries of one byte at 2 bits, and half of the look-ups and products.

By bit planes, up to 4 bits and for one row of x: a table of b bits is a polynomial of the code's bits, so a row
times x is a sum over sets of planes of a coefficient times a count of the bits that the AND of these planes shares with
a plane of x. Nothing is looked up.

Bytes a weight: b / 8, and nothing else of the planes is read.

Where programs may overlap (compute capability 9.0 on), weights are asked for while the kernel before still computes
("programmatic dependent launch"). Weights must therefore not be written by the kernels just before; ``prepare`` waits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pmpd.kernels import product
from pmpd.kernels.device import TILE, DeviceWeight, prepare
from pmpd.kernels.gated import TURN, gated
from pmpd.kernels.launch import MAX_ROWS
from pmpd.kernels.product import Fused, Operand
from pmpd.kernels.reference import WORD_BITS

__all__ = ["MAX_ROWS", "DeviceWeight", "dequantize", "matmul", "prepare"]

MAX_LAUNCHED_ROWS = 32
"""Rows of x up to which launches of ``MAX_ROWS`` are taken; above, the weight is decoded for the tensor cores."""
DECODED_WEIGHTS = 1 << 25
"""Weights decoded at a time for many rows of x: 64 MiB."""


def matmul(
    x: Tensor,
    weight: DeviceWeight,
    bits: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    gate: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``g(f(x) @ W.T + bias) + residual`` with W the weight at ``bits`` bits, on the current stream.

    At 2 bits several rows of x may take W with an error of ``device.BYTE_ERROR`` at most, the root mean square of
    its rows' relative errors, which one row does not: a row's result differs by that with how many others there are.

    Args:
        x: ``[..., in]``, of the weight's dtype and on its device.
        norm_weight: ``[in]``: f is RMSNorm, ``x * rsqrt(mean(x**2) + norm_eps) * norm_weight``.
        gate: g is :func:`pmpd.kernels.gated.gated`, whose result is half as wide; ``out`` below is then half the
            weight's.
        residual: ``[..., out]``.
        bias: ``[out]`` of the weight.
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
    _check_features(x, weight.in_features, weight.out_features)
    operand = Operand.of(weight, bits)
    if out is None:  # written out: torch.compile traces it
        return torch.ops.pmpd.nested_matmul(
            x,
            operand.packed,
            operand.table,
            operand.scales,
            bits,
            weight.out_features,
            weight.in_features,
            weight.group_size or 0,
            norm_weight,
            norm_eps,
            gate,
            residual,
            bias,
            *(operand.bytes_at_2 or ()),
        )
    _multiply(x, operand, Fused(norm_weight, norm_eps, gate, residual, bias), out)
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
    gate: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    byte_table: Tensor | None = None,
    byte_scales: Tensor | None = None,
) -> Tensor:
    """As :func:`matmul`, on the tensors of a :class:`DeviceWeight`; ``group_size`` 0 for whole rows.

    ``byte_table`` and ``byte_scales``: its ``bytes_at_2``, if it has them.
    """
    if (byte_table is None) != (byte_scales is None):
        raise ValueError("byte_table and byte_scales belong together: give both or neither")
    bytes_at_2 = (byte_table, byte_scales) if byte_table is not None and byte_scales is not None else None
    out = _result(x, out_features, gate)
    operand = Operand(packed, table, scales, bits, out_features, in_features, group_size, bytes_at_2)
    _multiply(x, operand, Fused(norm_weight, norm_eps, gate, residual, bias), out)
    return out


@_nested_matmul.register_fake
def _(  # type: ignore[no-untyped-def]
    x, packed, table, scales, bits, out_features, in_features, group_size, norm_weight=None, norm_eps=0.0, gate=False,
    residual=None, bias=None, byte_table=None, byte_scales=None,
):  # fmt: skip
    return _result(x, out_features, gate)


def _result(x: Tensor, out_features: int, gate: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features // 2 if gate else out_features)


def dequantize(weight: DeviceWeight, bits: int) -> Tensor:
    """``[out, in]`` at ``bits`` bits, in the weight's dtype.

    Raises:
        ValueError, CudaUnavailableError: as :func:`matmul`.
    """
    if bits not in weight.tables:
        raise ValueError(f"bits={bits} is not available; this weight has {sorted(weight.tables)}")
    out = torch.empty(weight.out_features, weight.in_features, dtype=weight.dtype, device=weight.packed.device)
    product.decode(Operand.of(weight, bits), 0, out)
    return out


def _multiply(x: Tensor, weight: Operand, fused: Fused, out: Tensor) -> None:
    _check(x, weight, fused, out)
    if not x.numel():
        return
    rows = x.numel() // x.shape[-1]
    flat, target = _aligned(x.reshape(rows, -1)), out.view(rows, -1)
    residual = None if fused.residual is None else fused.residual.reshape(rows, -1)
    norm_weight = None if fused.norm_weight is None else _aligned(fused.norm_weight)
    with torch.cuda.device(x.device):
        if rows > MAX_LAUNCHED_ROWS:
            _multiply_with_tensor_cores(flat, weight, fused, residual, target)
            return
        first = 0
        while first < rows:
            rest = None if residual is None else residual[first:]
            part = Fused(norm_weight, fused.norm_eps, fused.gated, rest, fused.bias)
            first += product.multiply(flat[first:], weight, part, target[first:])


def _check_features(x: Tensor, in_features: int, out_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features; the weight [{out_features}, {in_features}] takes {in_features}"
        )


def _check(x: Tensor, weight: Operand, fused: Fused, out: Tensor) -> None:
    in_features, out_features = weight.in_features, weight.out_features
    _check_features(x, in_features, out_features)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; the CUDA kernels take float16 and bfloat16")
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}: move one of them")
    tiles = weight.table.shape[0]
    num_planes, rest = divmod(weight.packed.numel() * WORD_BITS, in_features * tiles * TILE)
    byte_shapes = [tuple(tensor.shape) for tensor in weight.bytes_at_2 or ()]
    if (
        rest
        or num_planes < weight.bits
        or weight.scales.shape[0] != tiles * TILE
        or byte_shapes not in ([], [(tiles, 1, TILE, 4), (tiles * TILE, 2)])
    ):
        raise ValueError(f"planes, tables and scales are not those of a weight [{out_features}, {in_features}]")
    if fused.gated and out_features % (2 * TURN):
        raise ValueError(f"gate=True takes a weight of {2 * TURN} rows or a multiple, not {out_features}")
    result = (*x.shape[:-1], out_features // 2 if fused.gated else out_features)
    expected = {
        "norm_weight": (fused.norm_weight, (in_features,)),
        "bias": (fused.bias, (out_features,)),
        "residual": (fused.residual, result),
        "out": (out, result),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {list(shape)} of {x.dtype} on {x.device}, got {got}")
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def _multiply_with_tensor_cores(x: Tensor, weight: Operand, fused: Fused, residual: Tensor | None, out: Tensor) -> None:
    """The same for many rows: parts of the weight decoded to half precision, each multiplied by cuBLAS."""
    if fused.norm_weight is not None:
        x = functional.rms_norm(x.float(), x.shape[1:], fused.norm_weight.float(), fused.norm_eps).to(x.dtype)
    at_once = max(1, DECODED_WEIGHTS // (TILE * x.shape[1])) * TILE
    decoded = x.new_empty(min(at_once, weight.out_features), x.shape[1])
    for first in range(0, weight.out_features, at_once):
        rows = decoded[: weight.out_features - first]
        product.decode(weight, first, rows)
        part = x @ rows.T
        if fused.bias is not None:
            part += fused.bias[first : first + at_once]
        if fused.gated:
            part = gated(part)
        start = first // 2 if fused.gated else first
        columns = slice(start, start + part.shape[1])
        if residual is not None:
            part += residual[:, columns]  # read before it is written over
        out[:, columns] = part


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as vector loads need."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
