"""What a schedule costs: measured on this machine (``latency``), estimated for an NPU (``npu``)."""

from pmpd.hardware.latency import time_steps

__all__ = ["time_steps"]
