"""Loading a model for a stage: one place that turns input directories into something that decodes.

Knows folders, dtypes and devices; does not know what the stage is about to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from pmpd.models import attach, load_model
from pmpd.quant import PrecisionCell

T = TypeVar("T")


@dataclass(frozen=True)
class RuntimeConfig:
    """What of the machine can change a token, so it is part of the key."""

    dtype: str
    device: str
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def load(model: Path, nested: Path | None, runtime: RuntimeConfig) -> tuple[nn.Module, PrecisionCell | None]:
    """The model in ``model``, its block linears replaced by the nested ones of ``nested`` where given."""
    loaded = load_model(model, runtime.torch_dtype, runtime.device, runtime.trust_remote_code)
    return loaded, attach(loaded, nested) if nested is not None else None


def progress(items: Iterable[T], description: str, total: int | None = None, initial: int = 0) -> Iterable[T]:
    """A progress bar on a terminal; silent in a log file."""
    return tqdm(items, desc=description, total=total, initial=initial, disable=None, dynamic_ncols=True, leave=False)
