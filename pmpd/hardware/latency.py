"""Times any iterator of steps, step by step. Knows no model, no loop and no precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from pmpd.records import Step


def time_steps(make_steps: Callable[[], Iterator[Step]], *, warmup: int, repeats: int) -> list[float]:
    """Seconds of each decode step, the median over ``repeats`` runs, after ``warmup`` runs that do not count.

    ``make_steps`` builds one run's iterator; the time it takes to do so is not counted, and neither is a first
    step with index 0 (prefill). On CUDA the device is synchronised after every step, so a step's launches
    cannot hide behind the step before: what a user waits for a token.

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
    seconds = []
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what make_steps left running is not the first step's
    start = time.perf_counter()
    for step in steps:
        if step.tokens.is_cuda:
            torch.cuda.synchronize(step.tokens.device)
        end = time.perf_counter()
        if step.index > 0:
            seconds.append(end - start)
        start = time.perf_counter()
    return seconds
