"""What the CUDA kernels cannot run on; every message names the fix."""

from __future__ import annotations


class CudaUnavailableError(RuntimeError):
    """A GPU, a driver or an installation that cannot run the CUDA kernels."""
