"""What the command line says to an error: one line and an exit code for what a user can mend, the rest as it is."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipelines.interrupts import INTERRUPTED, came, heard
from pipelines.mistakes import explain, field_of_null
from pmpd.artifacts import StoreError, disk_is_full
from pmpd.kernels import CudaUnavailableError

log = logging.getLogger("pmpd.run")

ANSWERED = (
    ValueError,
    StoreError,
    CudaUnavailableError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    OSError,
    KeyboardInterrupt,
)

WHOLE = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""The user wants tracebacks. Read before :func:`answered` sets it for Hydra."""


def answer(error: BaseException) -> int:
    """Log it in a line; returns the exit code.

    Raises:
        BaseException: ``error`` itself, where its traceback says more: HYDRA_FULL_ERROR, an operating system's error
            that is no full disk, or whatever happened while Hydra made one of our callbacks.
    """
    if isinstance(error, KeyboardInterrupt) or came():
        log.error("interrupted; the same command goes on from here")
        return INTERRUPTED
    if isinstance(error, OSError) and disk_is_full(error):
        log.error("error: the disk is full (%s); free some space and run the same command again", error)
        return 1
    system = isinstance(error, OSError) and not isinstance(error, HydraException)  # a missing file of conf/ is both
    if system or WHOLE or isinstance(error, InstantiationException):
        raise error
    log.error("error: %s", explain(error))
    return 1


def answered(main: Callable[[], object]) -> None:
    """Run a function of ``hydra.main``'s; what is wrong before its job starts is answered as what is wrong in it.

    Hydra has no hook for its own errors: it prints them and exits. Asked for whole errors, it raises them instead.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with _answering(), heard():
        main()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (*ANSWERED, AssertionError) as error:
        if isinstance(error, AssertionError) and field_of_null(error) is None:
            raise
        sys.exit(answer(error))


@contextmanager
def ending() -> Iterator[None]:
    """Around what a callback of Hydra's does: any error ends the process, as it would outside of one.

    Hydra makes a warning of a callback's error and goes on, say with its own loop over a sweep's cells.
    """
    try:
        with _answering():
            yield
    except Exception:
        traceback.print_exc()
        sys.exit(1)


__all__ = ["ANSWERED", "answer", "answered", "ending"]
