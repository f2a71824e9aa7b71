"""What a stage is: a name, a version, a narrow configuration, and a function from inputs to a directory.

``run(config, inputs, out)`` may read only its configuration and its input directories, and may write
only below ``out``. ``out`` survives a kill, so a stage writes parts atomically and skips those that are
there. ``version`` goes up when the meaning of the output changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pmpd.artifacts import Input, Node, read_json, write_json

ConfigT = TypeVar("ConfigT")

SUMMARY = "summary.json"


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

    def differentiable(self) -> RuntimeConfig:
        """The same with a dtype in which gradients do not underflow, as those of float16 weights do."""
        return replace(self, dtype="bfloat16") if self.dtype == "float16" else self

    def on_gpu(self) -> RuntimeConfig:
        """The same on a GPU, in a dtype that its kernels take."""
        return replace(self, device="cuda", dtype="float16" if self.dtype == "float32" else self.dtype)


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """A pure step of the pipeline.

    Attributes:
        cost: what it costs, for the printed plan.
    """

    name: str
    version: int
    config_type: type[ConfigT]
    run: Callable[[ConfigT, Mapping[str, Path], Path], None]
    cost: str

    def node(self, config: ConfigT, **inputs: Input) -> Node:
        """The recipe of this stage under ``config``; an input of None is left out by the caller."""
        values: dict[str, Any] = asdict(config)  # type: ignore[call-overload]
        return Node(self.name, self.version, values, inputs)

    def execute(self, values: Mapping[str, Any], inputs: Mapping[str, Path], out: Path) -> None:
        """Run from a node's plain values."""
        fields = dict(values)
        if "runtime" in fields:
            fields["runtime"] = RuntimeConfig(**fields["runtime"])
        self.run(self.config_type(**fields), inputs, out)


def write_summary(
    out: Path,
    metrics: Mapping[str, float | int | str | None],
    curves: Mapping[str, list[dict[str, Any]]] | None = None,
    tables: Mapping[str, list[dict[str, Any]]] | None = None,
) -> None:
    """What a stage has to say, for tracking and reports: numbers, curves and small tables."""
    write_json(out / SUMMARY, {"metrics": dict(metrics), "curves": dict(curves or {}), "tables": dict(tables or {})})


def read_summary(path: Path) -> dict[str, Any]:
    return read_json(path / SUMMARY)
