"""What a schedule costs: measured on this machine (``latency``), estimated for an NPU (``npu``)."""

from pmpd.hardware.latency import time_steps
from pmpd.hardware.npu import NPU, decode_step_s, generation_time_s, prefill_s, tokens_per_s

__all__ = ["NPU", "decode_step_s", "generation_time_s", "prefill_s", "time_steps", "tokens_per_s"]
