"""Times any iterator of steps, step by step. Knows no model, no loop and no precision."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from pmpd.records import Step


def time_steps(make_steps: Callable[[], Iterator[Step]], *, warmup: int, repeats: int) -> list[float]:
    """Seconds of each decode step, the median over ``repeats`` runs, after ``warmup`` runs that do not count.

    ``make_steps`` builds one run's iterator; the time it takes to do so is not counted, and neither is a first
    step with index 0 (prefill). On CUDA the times are between events in the stream: the host may run ahead, as it does
    when nobody waits for a token, and only what it is too late for counts.

    Raises:
        ValueError: ``warmup`` below 0, ``repeats`` below 1, runs of different lengths, or runs without a decode step.
    """
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: at least 0")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1")
    for _ in range(warmup):
        _run(make_steps())
    runs = [_run(make_steps()) for _ in range(repeats)]
    lengths = sorted({len(run) for run in runs})
    if lengths == [0]:
        raise ValueError("make_steps yields no decode step, so there is nothing to time")
    if len(lengths) > 1:
        raise ValueError(f"make_steps yields runs of different lengths {lengths}: steps cannot be compared")
    return [median(step) for step in zip(*runs, strict=True)]


def _run(steps: Iterator[Step]) -> list[float]:
    seconds: list[float] = []
    marks: list[tuple[int, torch.cuda.Event]] = []
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what make_steps left running is not the first step's
        marks.append((0, _mark()))
    start = time.perf_counter()
    for step in steps:
        end = time.perf_counter()
        if step.tokens.is_cuda:
            marks.append((step.index, _mark()))
        elif step.index > 0:
            seconds.append(end - start)
        start = time.perf_counter()
    if len(marks) > 1:
        torch.cuda.synchronize()
        pairs = itertools.pairwise(marks)
        seconds = [before.elapsed_time(after) / 1e3 for (_, before), (index, after) in pairs if index > 0]
    return seconds


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
