"""A weight matrix quantised once for several precisions: bit planes, and one set of tables for each precision.

It knows no layers, models or files; ``kernels.reference`` says what planes and tables mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pmpd import kernels
from pmpd.quant import kmeans, lloyd
from pmpd.quant.sparse import Outliers

MAX_BITS = 8
SOLVERS = ("exact", "lloyd")
WORD_BITS = 32
BLOCK_WEIGHTS = 1 << 21
"""Weights clustered at a time: sorting and clustering take about 40 bytes a weight, so this bounds them to 80 MiB."""


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """Attributes:
    planes: int32 ``[parent_bits, out, ceil(in / 32)]``, most significant bit first.
    centroids: for each precision b, float16 ``[out, groups, 2**b]``.
    in_features: columns; the planes are padded to whole words.
    group_size: columns that share a table, the last group may be shorter; ``None`` for one table a row.
    outliers: a sparse term that every precision adds; ``None`` for none.
    """

    planes: Tensor
    centroids: dict[int, Tensor]
    in_features: int
    group_size: int | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        if not self.centroids:
            raise ValueError("centroids is empty: a nested weight needs the tables of at least one precision")
        if max(self.centroids) > self.parent_bits:
            raise ValueError(f"centroids of {max(self.centroids)} bits need as many planes, got {self.parent_bits}")

    @property
    def out_features(self) -> int:
        return self.planes.shape[1]

    @property
    def parent_bits(self) -> int:
        return self.planes.shape[0]

    @property
    def seed_bits(self) -> int:
        return min(self.centroids)

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """``[out, in]`` at ``bits`` bits, outliers added. Reads the first ``bits`` planes and that precision's tables.

        Raises:
            ValueError: there are no tables for ``bits``.
        """
        self._check(bits)
        tables = self.centroids[bits].to(dtype)
        dense = kernels.dequantize(self.planes, tables, bits, self.in_features, self.group_size)
        return dense if self.outliers is None else self.outliers.add_to(dense)

    def true_bits(self, bits: int) -> float:
        """What is read a weight at ``bits`` bits: planes, that precision's tables, outliers.

        Raises:
            ValueError: there are no tables for ``bits``.
        """
        self._check(bits)
        table = self.centroids[bits]
        beside = 8 * table.numel() * table.element_size() + (self.outliers.stored_bits if self.outliers else 0)
        return (32 * self.planes[:bits].numel() + beside) / (self.out_features * self.in_features)

    def entries(self, bits: int) -> Tensor:
        """Where in its row's tables of ``bits`` bits each weight's value is: ``[out, in]`` of whole numbers.

        Raises:
            ValueError: there are no tables for ``bits``.
        """
        self._check(bits)
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=self.planes.device)
        codes = torch.zeros(self.out_features, self.in_features, dtype=torch.uint8, device=self.planes.device)
        for plane in self.planes[:bits]:
            ones = ((plane[..., None] >> shifts) & 1).flatten(1)[:, : self.in_features]
            codes = (codes << 1) | ones.to(torch.uint8)
        if self.centroids[bits].shape[1] == 1:
            return codes
        assert self.group_size is not None
        groups = torch.arange(self.in_features, device=codes.device) // self.group_size
        return codes + (groups << bits).int()

    def prefix(self, bits: int) -> NestedWeight:
        """The same weight without what only precisions above ``bits`` read; shares memory.

        Raises:
            ValueError: there are no tables for ``bits``.
        """
        self._check(bits)
        tables = {b: table for b, table in self.centroids.items() if b <= bits}
        return NestedWeight(self.planes[:bits], tables, self.in_features, self.group_size, self.outliers)

    def to(self, device: torch.device | str) -> NestedWeight:
        """On ``device``."""
        tables = {b: table.to(device) for b, table in self.centroids.items()}
        outliers = None if self.outliers is None else self.outliers.to(device)
        return NestedWeight(self.planes.to(device), tables, self.in_features, self.group_size, outliers)

    def _check(self, bits: int) -> None:
        if bits not in self.centroids:
            raise ValueError(f"bits={bits} is not available; this weight has {sorted(self.centroids)}")

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named tensors for a file: ``<prefix>.planes``, ``<prefix>.centroids.<bits>``, ``<prefix>.layout``, outliers'.

        ``layout`` is int64 ``[in_features, group_size]``, with 0 for whole rows.
        """
        tensors = {
            f"{prefix}.planes": self.planes.contiguous(),
            f"{prefix}.layout": torch.tensor([self.in_features, self.group_size or 0]),
        }
        tensors |= {f"{prefix}.centroids.{bits}": table for bits, table in self.centroids.items()}
        return tensors if self.outliers is None else tensors | self.outliers.to_tensors(prefix)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> NestedWeight:
        """The weight that :meth:`to_tensors` wrote under ``prefix``; other names are ignored.

        Raises:
            ValueError: a tensor is missing.
        """
        for name in ("planes", "layout"):
            if f"{prefix}.{name}" not in tensors:
                raise ValueError(f"{prefix}.{name} is missing: not a nested weight, or a damaged file")
        in_features, group_size = tensors[f"{prefix}.layout"].tolist()
        start = f"{prefix}.centroids."
        tables = {int(name.removeprefix(start)): t for name, t in tensors.items() if name.startswith(start)}
        return cls(
            tensors[f"{prefix}.planes"],
            dict(sorted(tables.items())),
            in_features,
            group_size or None,
            Outliers.from_tensors(tensors, prefix),
        )


def quantize_weight(
    weight: Tensor,
    sensitivity: Tensor,
    *,
    seed_bits: int = 2,
    parent_bits: int = 8,
    group_size: int | None = None,
    solver: str = "exact",
) -> NestedWeight:
    """Quantise ``weight`` to every precision from ``seed_bits`` to ``parent_bits``, on the CPU.

    Each row (or row and group) gets the k-means clustering of least sensitivity-weighted squared error into
    ``2**seed_bits`` clusters; each further bit cuts every cluster in two (Any-Precision LLM, Park et al., 2024,
    "incremental upscaling", there with Lloyd's iterations for both). Nothing is random with the exact solver.

    Args:
        weight: ``[out, in]``, any floating dtype.
        sensitivity: ``[out, in]``, not negative; ones for plain k-means.
        group_size: columns that share a table; ``None`` for whole rows.
        solver: ``exact``, or ``lloyd`` for the search that the paper used.

    Raises:
        ValueError: shapes that differ, bits out of range, values that are not finite.
        ImportError: ``lloyd`` without its package.
    """
    if not 1 <= seed_bits <= parent_bits <= MAX_BITS:
        raise ValueError(f"need 1 <= seed_bits <= parent_bits <= {MAX_BITS}, got {seed_bits} and {parent_bits}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if weight.dim() != 2 or weight.shape != sensitivity.shape:
        raise ValueError(
            f"weight and sensitivity must be the same [out, in], got {list(weight.shape)}, {list(sensitivity.shape)}"
        )
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be >= 1 or None, got {group_size}")
    out_features, in_features = weight.shape
    columns = min(group_size or in_features, in_features)
    groups = -(-in_features // columns)
    whole = in_features // columns * columns
    codes = np.empty((out_features, in_features), np.uint8)
    precisions = range(seed_bits, parent_bits + 1)
    tables = {bits: np.empty((out_features, groups, 1 << bits), np.float16) for bits in precisions}
    rows_at_once = max(1, BLOCK_WEIGHTS // in_features)
    for first in range(0, out_features, rows_at_once):
        block = slice(first, first + rows_at_once)
        for part, span in ((slice(0, whole), columns), (slice(whole, None), in_features - whole)):
            if span == 0:
                continue
            values, weights = (_rows(t[block, part], span) for t in (weight, sensitivity))
            labels, centroids = _cluster(values, weights, precisions, solver)
            num_rows = len(codes[block])
            codes[block, part] = labels.reshape(num_rows, -1)
            part_groups = slice(0, whole // columns) if part.start == 0 else slice(whole // columns, None)
            for bits in precisions:
                tables[bits][block, part_groups] = centroids[bits].reshape(num_rows, -1, 1 << bits)
    return NestedWeight(
        pack(torch.from_numpy(codes), parent_bits),
        {bits: torch.from_numpy(table) for bits, table in tables.items()},
        in_features,
        None if groups == 1 else group_size,
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit planes of ``codes`` uint8 ``[out, in]``, on their device: int32 ``[bits, out, ceil(in / 32)]``, padded with
    zero bits."""
    if codes.device.type != "cpu":
        return _pack_there(codes, bits)
    out_features, in_features = codes.shape
    words = -(-in_features // WORD_BITS)
    planes = np.zeros((bits, out_features, words * WORD_BITS // 8), np.uint8)
    for b in range(bits):
        plane = np.packbits((codes.numpy() >> (bits - 1 - b)) & 1, axis=1, bitorder="little")
        planes[b, :, : plane.shape[1]] = plane
    return torch.from_numpy(planes.view("<i4").astype(np.int32, copy=False))


def _pack_there(codes: Tensor, bits: int) -> Tensor:
    """As :func:`pack`, in PyTorch: a GPU packs a large layer faster than it is copied, a CPU far slower."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=codes.device)
    words = functional.pad(codes, (0, -codes.shape[1] % WORD_BITS)).unflatten(1, (-1, WORD_BITS))
    planes = [((words >> (bits - 1 - b)) & 1).int() << places for b in range(bits)]
    return torch.stack([plane.sum(-1, dtype=torch.int32) for plane in planes])


def _rows(tensor: Tensor, span: int) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).reshape(-1, span).numpy()


def _cluster(
    values: NDArray[np.float32], weights: NDArray[np.float32], precisions: range, solver: str
) -> tuple[NDArray[np.uint8], dict[int, NDArray[np.float16]]]:
    """Parent codes ``[rows, n]`` and tables ``[rows, 2**b]`` of the precisions b."""
    seed, split = kmeans.seed_clusters, kmeans.split_clusters
    if solver == "lloyd":
        seed, split = lloyd.seed_clusters, lloyd.split_clusters
    rows = kmeans.sort_rows(values, weights)
    cuts = seed(rows, 1 << precisions.start)
    tables = {precisions.start: _to_float16(kmeans.centroids(rows, cuts))}
    for bits in precisions[1:]:
        cuts = split(rows, cuts)
        tables[bits] = _to_float16(kmeans.centroids(rows, cuts))
    return kmeans.labels(rows, cuts), tables


def _to_float16(means: NDArray[np.float64]) -> NDArray[np.float16]:
    limit = float(np.finfo(np.float16).max)
    return np.clip(means, -limit, limit).astype(np.float16)
