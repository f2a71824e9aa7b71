"""Ctrl-C that is not lost: where Python can raise nothing, or libraries break, it waits a moment and comes again.

Knows neither what is interrupted nor what is then said.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace

AGAIN_S = 0.05

COMPILERS = ("llvmlite", "numba")
"""Packages whose Python code LLVM calls, and which leave halves of LLVM's objects when they are interrupted: of 33
interrupts within 30 ms of a quantiser's start 3 were lost and 2 followed by a traceback of llvmlite's."""

INTERRUPTED = 130
"""What a process exits with, as shells have it."""

_latest = SimpleNamespace(came=False)  # no threading.Event: its lock would stop a handler that interrupts another


def came() -> bool:
    """Whether SIGINT was raised in the latest :func:`heard`: an error after it may be what C code made of it."""
    return bool(_latest.came)


def leave_at_once() -> None:
    """Until :func:`heard` SIGINT ends the process in a word: while modules load there is nothing to put in order.

    For a program's first lines, as imports take seconds. An ignored SIGINT stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def heard() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt in the main thread, after a compiler or a ``__del__`` where one runs.

    Takes SIGALRM's timer for that; where a system has none, nothing changes. Where SIGINT is ignored, as in a job that
    a shell started in the background, it stays so.
    """
    _latest.came = False
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    say_lost, at_alarm = sys.unraisablehook, signal.getsignal(signal.SIGALRM)

    def again_if_lost(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            say_lost(lost)

    sys.unraisablehook = again_if_lost
    signal.signal(signal.SIGALRM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, at_alarm)
        sys.unraisablehook = say_lost


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")  # no stream, which the interrupted code may be writing to
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    compiling = _within(frame, COMPILERS)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S if compiling else 0)
    if not compiling:
        _latest.came = True
        raise KeyboardInterrupt


def _within(frame: FrameType | None, packages: tuple[str, ...]) -> bool:
    """Whether code of ``packages`` runs or waits for what runs."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            return True
        frame = frame.f_back
    return False


__all__ = ["INTERRUPTED", "came", "heard", "leave_at_once"]
