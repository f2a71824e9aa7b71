"""What the command line says to an error: one line and an exit code for what a user can mend, the rest as it is."""

from __future__ import annotations

import logging
import os

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pmpd.artifacts import StoreError, disk_is_full
from pmpd.kernels import CudaUnavailableError

log = logging.getLogger("pmpd.run")

ANSWERED = (
    ValueError,
    StoreError,
    CudaUnavailableError,
    HydraException,
    OmegaConfBaseException,
    OSError,
    KeyboardInterrupt,
)


def answer(error: BaseException) -> int:
    """Log it in a line; returns the exit code.

    Raises:
        BaseException: ``error`` itself, where its traceback says more: HYDRA_FULL_ERROR, or an operating system's error
            that is no full disk.
    """
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted; the same command goes on from here")
        return 130
    if isinstance(error, OSError) and disk_is_full(error):
        log.error("error: the disk is full (%s); free some space and run the same command again", error)
        return 1
    if isinstance(error, OSError) or os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    log.error("error: %s", error)
    return 1


__all__ = ["ANSWERED", "answer"]
