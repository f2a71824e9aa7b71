from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from pmpd.hardware import latency
from pmpd.hardware.latency import time_steps
from pmpd.records import Step


def step(index: int) -> Step:
    return Step(index, torch.zeros(1, dtype=torch.long), 4, torch.zeros(1, dtype=torch.long))


class Clock:
    """Time that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def runs(self, *durations: list[float], first_index: int = 1) -> Callable[[], Iterator[Step]]:
        waiting = list(durations)

        def make_steps() -> Iterator[Step]:
            self.now += 1000.0  # preparing a run is not timed
            return self._steps(waiting.pop(0), first_index)

        return make_steps

    def _steps(self, durations: list[float], first_index: int) -> Iterator[Step]:
        for index, duration in enumerate(durations, start=first_index):
            self.now += duration
            yield step(index)
        self.now += 500.0  # nor is what happens after the last step


def test_median_of_each_step_over_the_runs_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    make_steps = Clock(monkeypatch).runs([90, 90], [1, 5], [3, 4], [2, 90])
    assert time_steps(make_steps, warmup=1, repeats=3) == [2, 5]


def test_prefill_is_not_a_decode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_steps(Clock(monkeypatch).runs([70, 1, 2], first_index=0), warmup=0, repeats=1) == [1, 2]


def test_the_consumer_is_not_timed() -> None:
    def make_steps() -> Iterator[Step]:
        for index in range(1, 4):
            time.sleep(0.01)
            yield step(index)

    seconds = time_steps(make_steps, warmup=0, repeats=2)
    assert len(seconds) == 3
    assert all(0.009 < value < 0.2 for value in seconds)


def test_on_a_gpu_the_times_are_between_events_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        times: ClassVar[list[float]] = [0.0, 1000.0, 1002.0, 1007.0]  # start, prefill, two steps

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = Event.times.pop(0)

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = [SimpleNamespace(index=i, tokens=SimpleNamespace(is_cuda=True)) for i in (0, 1, 2)]
    assert time_steps(lambda: iter(steps), warmup=0, repeats=1) == [0.002, 0.005]  # type: ignore[arg-type]


def test_what_cannot_be_timed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match=r"different lengths \[1, 2\]"):
        time_steps(clock.runs([1], [1, 2]), warmup=0, repeats=2)
    with pytest.raises(ValueError, match="no decode step"):
        time_steps(clock.runs([9], first_index=0), warmup=0, repeats=1)
    with pytest.raises(ValueError, match="repeats=0"):
        time_steps(clock.runs(), warmup=0, repeats=0)
    with pytest.raises(ValueError, match="warmup=-1"):
        time_steps(clock.runs(), warmup=-1, repeats=1)
