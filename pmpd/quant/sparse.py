"""Outliers: a sparse float16 term beside a matrix's codes, so that ``W = dense + sparse`` ("dense and sparse").

It knows a matrix and scores of its entries: neither how the others are quantised nor where scores come from. The term
is the same at every precision (SqueezeLLM, Kim et al., 2024, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORT = 1 << 16
"""Columns and counts take 16 bits in a matrix of fewer columns than this, 32 in a wider one."""
FIELDS = ("values", "columns", "counts", "in_features")


@dataclass(frozen=True, eq=False)
class Outliers:
    """Sparse rows, one after the other.

    Attributes:
        values: float16 ``[n]``, by row, then column: what is added to the dense matrix there.
        columns: uint16 ``[n]``, int32 in a wide matrix.
        counts: how many each row has, ``[out]``, of the same type.
        in_features: columns of the matrix.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        return len(self.counts)

    @property
    def stored_bits(self) -> int:
        """What is read with the matrix at any precision: values, columns and counts, all of them."""
        return 8 * sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.counts))

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each, int64 ``[n]``: an index of the matrix."""
        rows = torch.arange(self.out_features, device=self.counts.device)
        return rows.repeat_interleave(self.counts.long()), self.columns.long()

    def add_to(self, dense: Tensor) -> Tensor:
        """``dense + sparse``, ``[out, in]`` in the dtype of ``dense``; a copy."""
        return dense.index_put(self.places(), self.values.to(dense.dtype), accumulate=True)

    @classmethod
    def stacked(cls, parts: Sequence[Outliers]) -> Outliers:
        """Of matrices one above the other, with the same number of columns."""
        values, columns, counts = (torch.cat([getattr(part, name) for part in parts]) for name in FIELDS[:3])
        return cls(values, columns, counts, parts[0].in_features)

    def rows(self, order: Tensor) -> Outliers:
        """Of the matrix whose row i is this one's row ``order[i]``, int64 on the same device."""
        counts = self.counts.long()
        starts, taken = (counts.cumsum(0) - counts)[order], counts[order]
        within = torch.arange(len(self.values), device=order.device)
        within -= (taken.cumsum(0) - taken).repeat_interleave(taken)
        places = starts.repeat_interleave(taken) + within
        columns = self.columns.long()[places].to(self.columns.dtype)
        return Outliers(self.values[places], columns, taken.to(self.counts.dtype), self.in_features)

    def to(self, device: torch.device | str) -> Outliers:
        """On ``device``."""
        return Outliers(self.values.to(device), self.columns.to(device), self.counts.to(device), self.in_features)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named tensors for a file, ``<prefix>.outliers.<field>``."""
        tensors = (self.values, self.columns, self.counts, torch.tensor(self.in_features))
        return {f"{prefix}.outliers.{name}": tensor for name, tensor in zip(FIELDS, tensors, strict=True)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Outliers | None:
        """What :meth:`to_tensors` wrote under ``prefix``; None if it wrote nothing.

        Raises:
            ValueError: some of its tensors are missing.
        """
        found = {name: tensors[key] for name in FIELDS if (key := f"{prefix}.outliers.{name}") in tensors}
        if not found:
            return None
        if missing := [name for name in FIELDS if name not in found]:
            raise ValueError(f"{prefix}.outliers.{missing[0]} is missing: a damaged file")
        return cls(found["values"], found["columns"], found["counts"], int(found["in_features"]))


def take_outliers(weight: Tensor, dense: Tensor, chosen: Tensor) -> Outliers:
    """The term that makes ``dense`` equal to ``weight`` where ``chosen`` says so, but for rounding to float16.

    A nested model's dense part differs from precision to precision; then ``dense`` is what it is quantised from, with
    values that suit its codes at the chosen places.

    Args:
        weight, dense: ``[out, in]``, any floating dtype.
        chosen: bool, the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    if weight.dim() != 2 or not weight.shape == dense.shape == chosen.shape:
        shapes = [list(tensor.shape) for tensor in (weight, dense, chosen)]
        raise ValueError(f"weight, dense and chosen must be the same [out, in], got {shapes}")
    limit = torch.finfo(torch.float16).max
    index = _index_dtype(weight.shape[1])
    change = weight[chosen].float() - dense[chosen].float()
    return Outliers(
        change.clamp(-limit, limit).half(),
        chosen.nonzero()[:, 1].to(index),
        chosen.sum(1).to(index),
        weight.shape[1],
    )


def highest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest of ``scores`` are: bool, the same shape; of equals the first.

    For outliers by magnitude give ``weight.abs()``; by sensitivity the mean squared gradients (SqueezeLLM), or these
    times the squared error of the codes there, which is the loss that an outlier saves.

    Raises:
        ValueError: a count out of range, or scores that are not finite.
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"count={count} must be 0 to {scores.numel()}, the number of scores")
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite")
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]] = True
    return chosen.view_as(scores)


def stored_bits(count: int, out_features: int, in_features: int) -> int:
    """:attr:`Outliers.stored_bits` of ``count`` outliers in an ``[out_features, in_features]`` matrix."""
    index_bits = 8 * _index_dtype(in_features).itemsize
    return count * (16 + index_bits) + out_features * index_bits


def count_within(bits: float, out_features: int, in_features: int) -> int:
    """The most outliers whose :func:`stored_bits` are at most ``bits``."""
    fixed = stored_bits(0, out_features, in_features)
    each = stored_bits(1, out_features, in_features) - fixed
    return min(max(int((bits - fixed) // each), 0), out_features * in_features)


def _index_dtype(in_features: int) -> torch.dtype:
    return torch.uint16 if in_features < SHORT else torch.int32
