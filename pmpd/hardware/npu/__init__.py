"""An analytical model of a neural processing unit after FlightLLM (arXiv 2401.03868): machine, operations, model."""

from pmpd.hardware.npu.machine import NPU, StoredWeights
from pmpd.hardware.npu.model import (
    Forward,
    decode_forward,
    decode_steps_s,
    generation_s,
    prefill_forward,
    tokens_per_s,
)
from pmpd.hardware.npu.shapes import published_shapes

__all__ = [
    "NPU",
    "Forward",
    "StoredWeights",
    "decode_forward",
    "decode_steps_s",
    "generation_s",
    "prefill_forward",
    "published_shapes",
    "tokens_per_s",
]
