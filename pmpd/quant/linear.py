"""A linear layer that runs at the precision its cell says, and the cell that a model's layers share.

Neither knows which model the layers belong to, nor how their weights were quantised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pmpd.kernels import cuda
from pmpd.quant.nested import NestedWeight
from pmpd.records import FP16_BITS

PACKED_DTYPES = (torch.float16, torch.bfloat16)
"""What the CUDA kernels compute in."""


class PrecisionCell:
    """The precision that all layers registered with it run at; a switch is one assignment to :attr:`bits`.

    ``bits = 16`` is the unquantised model, and the first precision where there is one; else the highest.
    """

    def __init__(self) -> None:
        self.layers: list[NestedLinear] = []
        self._available: frozenset[int] = frozenset({FP16_BITS})
        self._bits = FP16_BITS

    @property
    def available(self) -> list[int]:
        """Precisions that every layer has, rising; 16 is always one."""
        return sorted(self._available)

    @property
    def bits(self) -> int:
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits not in self._available:
            raise ValueError(f"bits={bits} is not available; this model has {self.available}")
        self._bits = bits

    def register(self, layer: NestedLinear) -> None:
        """Let ``layer`` follow this cell. A layer does so itself when it is made."""
        own = frozenset({*layer.precisions, *([FP16_BITS] if layer.weight is not None else [])})
        self._available = self._available & own if self.layers else own
        self.layers.append(layer)
        self._stay_available()

    def prepare(self, bits: int) -> None:
        """Dequantise (or pack) every layer at ``bits`` now, so that the first forward costs what the next ones do."""
        if bits not in self._available:
            raise ValueError(f"bits={bits} is not available; this model has {self.available}")
        for layer in self.layers:
            if layer.packed is None:
                layer.weight_at(bits)

    def drop_originals(self) -> None:
        """Free the layers' unquantised weights: 16 bits is then no precision of the model."""
        for layer in self.layers:
            layer.drop_original()
        self._available -= {FP16_BITS}
        self._stay_available()

    def _stay_available(self) -> None:
        if self._available and self._bits not in self._available:
            self._bits = max(self._available)

    def drop(self, bits: int | None = None) -> None:
        """Free the layers' dequantised weights at ``bits``, or at every precision. They come back when used."""
        for layer in self.layers:
            layer.drop(bits)


class NestedLinear(nn.Module):
    """A linear layer at ``cell.bits``.

    At 16 bits it is ``original``. Below, on a GPU in float16 or bfloat16, it is the kernels' product with the weight
    as :attr:`packed` has it, all precisions at once. Elsewhere the weight is dequantised at first use, on the device
    and in the dtype that the layer has then, and kept until it is dropped or the module moves.

    ``weight`` and ``bias`` are the original's own parameters, so state dicts keep their names. ``weight`` is None once
    the original was dropped, or where there never was one; the layer then has no 16 bits.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    nested: NestedWeight | None
    anchor: Tensor

    def __init__(self, weight: NestedWeight, original: nn.Linear, cell: PrecisionCell) -> None:
        """Raises:
        ValueError: shapes of ``weight`` and ``original`` differ.
        """
        super().__init__()
        shape = (weight.out_features, weight.in_features)
        if tuple(original.weight.shape) != shape:
            raise ValueError(f"the nested weight is {list(shape)}, the layer {list(original.weight.shape)}")
        self.register_parameter("weight", original.weight)  # type: ignore[arg-type]
        self._set(weight, original.bias, original.weight, cell)

    @classmethod
    def without_original(
        cls, weight: NestedWeight, bias: Tensor | None, dtype: torch.dtype, cell: PrecisionCell
    ) -> NestedLinear:
        """A layer of nested weights alone, on their device, that computes in ``dtype``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.register_parameter("weight", None)
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer._set(weight, parameter, torch.empty(0, dtype=dtype, device=weight.planes.device), cell)
        return layer

    def _set(self, weight: NestedWeight, bias: nn.Parameter | None, like: Tensor, cell: PrecisionCell) -> None:
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bias = bias
        # Moves with the module, and so says where and in which dtype to compute when the original is gone.
        self.register_buffer("anchor", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        self.nested = weight
        self.has_outliers = weight.outliers is not None
        self.precisions = tuple(sorted(weight.centroids))
        self.cell = cell
        self._dequantized: dict[int, Tensor] = {}
        self._packed: cuda.DeviceWeight | None = None
        cell.register(self)

    def drop_original(self) -> None:
        """Free the unquantised weight."""
        self.weight = None

    @property
    def packed(self) -> cuda.DeviceWeight | None:
        """The weight as the CUDA kernels read it, made when first asked for; None where they do not compute (a CPU,
        float32, outliers). Planes that lie on the GPU themselves are then given up: :attr:`nested` is None.

        Raises:
            ValueError: a weight that the kernels do not do; the message names it.
        """
        if (
            self._packed is None
            and self.anchor.is_cuda
            and self.anchor.dtype in PACKED_DTYPES
            and not self.has_outliers
        ):
            assert self.nested is not None
            there = self.nested.to(self.anchor.device)
            self._packed = cuda.prepare(
                there.planes, there.centroids, there.in_features, there.group_size, self.anchor.dtype
            )
            if self.nested.planes.is_cuda:
                self.nested = None
        return self._packed

    def weight_at(self, bits: int) -> Tensor:
        """``[out, in]`` at ``bits`` bits, on this layer's device and in its dtype."""
        if bits == FP16_BITS:
            if self.weight is None:
                raise ValueError("bits=16 is not available: the unquantised weights were dropped")
            return self.weight
        if self.packed is not None:
            return cuda.dequantize(self.packed, bits)
        if bits not in self._dequantized:
            assert self.nested is not None
            with torch.no_grad():
                nested = self.nested.prefix(bits).to(self.anchor.device)
                self._dequantized[bits] = nested.dequantize(bits, self.anchor.dtype)
        return self._dequantized[bits]

    def drop(self, bits: int | None = None) -> None:
        """Free the dequantised weight at ``bits``, or all of them."""
        if bits is None:
            self._dequantized.clear()
        else:
            self._dequantized.pop(bits, None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` at the cell's precision."""
        bits = self.cell.bits
        if bits != FP16_BITS and self.packed is not None:
            return cuda.matmul(x, self.packed, bits, bias=self.bias)
        return functional.linear(x, self.weight_at(bits), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        was = (self.anchor.device, self.anchor.dtype)
        super()._apply(fn, recurse)
        if was != (self.anchor.device, self.anchor.dtype):
            if self.nested is None:
                raise ValueError(f"a layer packed for {was} cannot change device or dtype: load the model again")
            self.drop()
            self._packed = None
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={list(self.precisions)}"
        )
