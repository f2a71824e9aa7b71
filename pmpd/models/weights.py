"""Single weights of a model straight from its files, so that memory is bounded by one layer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pmpd.models.blocks import block_linears
from pmpd.models.errors import ModelError
from pmpd.models.load import empty_model, open_safetensors, weight_files


def linear_names(folder: Path, trust_remote_code: bool = False) -> list[str]:
    """Module paths of :func:`~pmpd.models.blocks.block_linears`, without loading a weight."""
    return list(block_linears(empty_model(folder, trust_remote_code)))


class LazyWeights:
    """Tensors of a folder's safetensors by the model's own names; nothing is kept."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        ModelError: weights that are missing or damaged.
        """
        self.folder = folder
        self._files = weight_files(folder)

    @cached_property
    def _place(self) -> dict[str, Any]:
        """The open file that holds each tensor."""
        place: dict[str, Any] = {}
        for file in self._files:
            handle = open_safetensors(file)
            place |= dict.fromkeys(handle.keys(), handle)
        return place

    def weight(self, name: str) -> Tensor:
        """``[out, in]`` in the stored dtype, of the linear layer at module path ``name``."""
        return self.tensor(f"{name}.weight")

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the stored dtype. A checkpoint of the bare decoder may leave out its prefix.

        Raises:
            ModelError: no such tensor.
        """
        stored = name
        if stored not in self._place:
            like = [k for k in self._place if name.endswith(f".{k}") or k.endswith(f".{name}")]
            if len(like) != 1:
                raise ModelError(f"{self.folder} has no tensor {name} (it has {', '.join(list(self._place)[:3])}, ...)")
            stored = like[0]
        return self._place[stored].get_tensor(stored)
