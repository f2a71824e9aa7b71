"""What a schedule costs: timed on this machine (``latency``, ``gpu``), estimated for an NPU (``npu``)."""

from pmpd.hardware.gpu import conditions, machine, self_cuda_us
from pmpd.hardware.latency import time_steps

__all__ = ["conditions", "machine", "self_cuda_us", "time_steps"]
