"""Kernel times on an NVIDIA GPU, and what it was that was timed. Knows no model and no precision."""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

FLUSH_L2_COPIES = 4
"""How many times its second-level cache a GPU reads between two forwards, to push everything else out."""


def machine(device: str) -> str:
    """What times depend on, in words: the GPU and its driver, or the processor and its threads, and PyTorch.

    Raises:
        ValueError: ``cuda`` where there is none.
    """
    if device == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    if not torch.cuda.is_available():
        raise ValueError("device=cuda: PyTorch sees no CUDA device here")
    return f"{torch.cuda.get_device_name()}, driver {_driver()}, PyTorch {torch.__version__}"


def conditions(device: str) -> dict[str, Any]:
    """What a record of times says about how they came about."""
    found: dict[str, Any] = {"machine": machine(device)}
    if device != "cpu":
        others = other_processes()
        if others:
            log.warning("%d other processes use this GPU: times are of all of them; time again without them", others)
        found |= {
            "other_processes": others,
            "cuda": torch.version.cuda,
            "sm_clock_mhz": _smi("clocks.sm"),
            "max_sm_clock_mhz": _smi("clocks.max.sm"),
            "memory_clock_mhz": _smi("clocks.mem"),
        }
    return found


def self_cuda_us(forward: Callable[[], object], *, forwards: int, flushed: bool) -> float:
    """Mean self CUDA time of a forward by PyTorch's profiler: kernels alone, no gaps between them.

    Args:
        forwards: how many, in a row (the paper: 100).
        flushed: read a buffer larger than the second-level cache before each, whose own time, measured alone in the
            same way, is taken off. Without it small weights stay in that cache, as in the paper's measurement.

    Raises:
        RuntimeError: reading the buffer alone took longer than both together, as happens beside other processes.
    """
    buffer = torch.empty(0, device="cuda")
    if flushed:
        size = FLUSH_L2_COPIES * torch.cuda.get_device_properties().L2_cache_size
        buffer = torch.zeros(size // 4, device="cuda")

    def between() -> None:
        if flushed:
            buffer.sum()

    def both() -> None:
        between()
        forward()

    for _ in range(3):
        both()
    total_us = _profiled_us(both, forwards)
    if not flushed:
        return total_us / forwards
    own_us = total_us - _profiled_us(between, forwards)
    if own_us <= 0:
        raise RuntimeError(
            f"reading the cache's size alone took {-own_us / forwards:.1f} us longer than with a forward after it: "
            "something else runs on this GPU; end it and time again"
        )
    return own_us / forwards


def _profiled_us(run: Callable[[], object], times: int) -> float:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiler.key_averages()))


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _driver() -> str:
    return _smi("driver_version")


def other_processes() -> int | None:
    """How many other processes have a context on PyTorch's current GPU; None where ``nvidia-smi`` does not say.

    This process is one of those that it lists, under whatever number its container gives it.
    """
    found = _ask_smi("--query-compute-apps=pid")
    return None if found is None else max(0, len(found.split()) - 1)


def _smi(field: str) -> str:
    """One field of ``nvidia-smi`` for PyTorch's current GPU, ``unknown`` where that is not installed."""
    return _ask_smi(f"--query-gpu={field}") or "unknown"


def _ask_smi(query: str) -> str | None:
    uuid = torch.cuda.get_device_properties().uuid  # its own count of GPUs knows nothing of CUDA_VISIBLE_DEVICES
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
