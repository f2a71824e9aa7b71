"""The one operation of a nested model, dispatched to the fastest kernel for the device."""

from pmpd.kernels.reference import dequantize, nested_matmul

__all__ = ["dequantize", "nested_matmul"]
