"""The one operation of a nested model, on the fastest kernel for the tensors' device.

``reference`` defines the format and the result; the other modules only compute the same sooner. On a GPU the weight is
re-ordered once (``cuda.prepare``) and multiplied as it is (``cuda.matmul``).
"""

from __future__ import annotations

from torch import Tensor

from pmpd.kernels import cpu, cuda, reference
from pmpd.kernels.errors import CudaUnavailableError

__all__ = ["CudaUnavailableError", "dequantize", "nested_matmul"]


def dequantize(planes: Tensor, centroids: Tensor, bits: int, in_features: int, group_size: int | None = None) -> Tensor:
    """As :func:`pmpd.kernels.reference.dequantize`."""
    kernel = cpu if planes.device.type == "cpu" else reference
    return kernel.dequantize(planes, centroids, bits, in_features, group_size)


def nested_matmul(x: Tensor, planes: Tensor, centroids: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """As :func:`pmpd.kernels.reference.nested_matmul`.

    On a GPU each call re-orders the weight; who multiplies by it again prepares it once, as layers do.

    Raises:
        ValueError: on a GPU, what :func:`pmpd.kernels.cuda.prepare` refuses, float32 among it. The reference takes it.
    """
    if x.is_cuda:
        packed = cuda.prepare(planes[:bits], {bits: centroids}, x.shape[-1], group_size, x.dtype)
        return cuda.matmul(x, packed, bits)
    weight = dequantize(planes, centroids.to(x.dtype), bits, x.shape[-1], group_size)
    return x @ weight.T
