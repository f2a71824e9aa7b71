"""Times by PyTorch's profiler, and what a record says of the GPU: with the GPU's answers given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from pmpd.hardware import gpu


def answers(monkeypatch: pytest.MonkeyPatch, both_us: float, reading_us: float) -> None:
    """A profiler that finds these microseconds for a forward after reading the cache's size, and for reading alone."""
    zeros = torch.zeros
    properties = SimpleNamespace(L2_cache_size=1 << 10, uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch, "empty", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))

    def profiled(run: Callable[[], object], times: int) -> float:
        return times * (both_us if run.__name__ == "both" else reading_us)

    monkeypatch.setattr(gpu, "_profiled_us", profiled)


def test_what_reading_the_cache_takes_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, both_us=80.0, reading_us=75.5)
    assert gpu.self_cuda_us(lambda: None, forwards=10, flushed=True) == pytest.approx(4.5)
    assert gpu.self_cuda_us(lambda: None, forwards=10, flushed=False) == pytest.approx(80.0)


def test_a_time_below_zero_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, both_us=70.0, reading_us=75.5)
    with pytest.raises(RuntimeError, match=r"took 5\.5 us longer.*something else runs on this GPU"):
        gpu.self_cuda_us(lambda: None, forwards=10, flushed=True)


@pytest.mark.parametrize(("listed", "others"), [("12\n", 0), ("12\n 40\n41", 2), ("", 0), (None, None)])
def test_a_record_says_whether_the_gpu_was_shared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, listed: str | None, others: int | None
) -> None:
    monkeypatch.setattr(gpu, "machine", lambda device: "an H100")
    monkeypatch.setattr(gpu, "_ask_smi", lambda query: listed if "compute-apps" in query else "1980")
    with caplog.at_level(logging.WARNING):
        found = gpu.conditions("cuda")
    assert found["other_processes"] == others
    assert found["sm_clock_mhz"] == "1980"
    assert ("other processes use this GPU" in caplog.text) == bool(others)
