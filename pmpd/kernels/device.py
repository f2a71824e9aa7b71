"""A nested weight in the order in which the CUDA kernels read it, and how it gets there.

It knows no kernel and no GPU: plain tensor operations, on any device.

Planes. A tile is 16 rows, a unit 128 columns of a tile. The first two planes are stored together, as 2-bit fields;
each further plane alone. So the planes of the lowest b bits are the first ``b / parent_bits`` of ``packed``, and
nothing else is read at b bits. In a unit the 32 columns of one file word belong to one lane (lane ``4 * g + t`` has
word t of rows g and g + 8), and the lanes' words follow each other, so that a warp reads contiguous memory. A last
unit of fewer columns has no words for the lanes without columns. Rows are padded to a multiple of 16.

Bits. Column ``8 * p + n`` of a word (p < 4, n < 8) lies in nibble n: its 2-bit field (plane 0 the upper bit) in word
``p // 2`` at bit ``4 * n + 2 * (p % 2)``, its bit of a higher plane at ``4 * n + (0, 2, 1, 3)[p]``. So one shift brings
eight weights' bits to the same place of eight nibbles, a selector of ``prmt``; and the even, or odd, bits of the two
words of pairs make a word of plane 1, or 0, in the order of the higher planes.

Tables. Entry i belongs to the code whose planes 0 and 1 are bits 1 and 0 of i, and whose plane k > 1 is bit k. Values
are 16-bit integers (14-bit at 4 and 5 bits) of a row's own scale and offset, ``value = scale * integer + offset``:
rounding costs at most 2**-17 (2**-15) of the row's range. Up to 5 bits a row has its high digits, then its low digits,
one byte each, which is what the integer tensor cores multiply; above, 16-bit entries.

Bytes. Of 128 scales one puts the two inner of a row's four values at 2 bits within some hundredths of an integer below
256, and scale and offset may be fitted to the row's codes after that. So at 2 bits there are tables of one byte an
entry too, for products of several rows of x, which have half the digits to look up and to multiply with them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pmpd.kernels.reference import WORD_BITS, check_format

log = logging.getLogger(__name__)

TILE = 16
"""Rows of a tile."""
UNIT = 128
"""Columns of a unit."""
MIN_BITS, MAX_BITS = 2, 8
MAX_IN_FEATURES = 1 << 16
"""Sums of digit products stay below 2**31 up to here: 128 * 255 * 2**16."""
REGISTER_BITS = 5
"""Precisions up to this one keep high and low digits apart."""
EIGHT_ENTRIES_BITS = 3
"""Above it, a table in registers is several of eight entries, and digits have seven bits."""
BYTE_BITS = 2
"""The precision that may have tables of bytes."""
BYTE_ERROR = 1e-3
"""What they may cost: the norm of a row's errors over that of its values; of a weight's rows, the root mean square."""
ROWS_AT_ONCE = 4096
"""Rows that bytes are sought for at the same time: 128 candidates each take memory."""
PLANE_BIT = (0, 2, 1, 3)
"""Of a column of each part p, in its nibble of a word of a plane above the first two."""


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """Attributes:
    packed: int32, all planes (see the module).
    tables: for each precision b, uint8 ``[tiles, groups, 16, 2 * 2**b]``.
    scales: for each precision, float32 ``[16 * tiles, 2]``: scale and offset of each row's integers.
    bytes_at_2: tables of bytes, uint8 ``[tiles, 1, 16, 4]``, and their scales; ``None`` without 2 bits, with groups, or
        if they would cost more than ``BYTE_ERROR``, which is logged.
    group_size: columns that share a table, a multiple of 32; ``None`` for whole rows.
    dtype: of the products, float16 or bfloat16.
    """

    packed: Tensor
    tables: dict[int, Tensor]
    scales: dict[int, Tensor]
    bytes_at_2: tuple[Tensor, Tensor] | None
    out_features: int
    in_features: int
    group_size: int | None
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Everything that it keeps on the device."""
        parts = [self.packed, *self.tables.values(), *self.scales.values(), *(self.bytes_at_2 or ())]
        return sum(part.numel() * part.element_size() for part in parts)

    def to(self, device: torch.device | str) -> DeviceWeight:
        """On ``device``."""
        tables = {bits: table.to(device) for bits, table in self.tables.items()}
        scales = {bits: scale.to(device) for bits, scale in self.scales.items()}
        two = self.bytes_at_2 and (self.bytes_at_2[0].to(device), self.bytes_at_2[1].to(device))
        shape = (self.out_features, self.in_features, self.group_size, self.dtype)
        return DeviceWeight(self.packed.to(device), tables, scales, two, *shape)._written()

    def _written(self) -> DeviceWeight:
        """Itself, once it is there: the kernels read weights ahead of the stream's order."""
        if self.packed.is_cuda:
            torch.cuda.synchronize(self.packed.device)
        return self


def prepare(
    planes: Tensor, centroids: dict[int, Tensor], in_features: int, group_size: int | None, dtype: torch.dtype
) -> DeviceWeight:
    """The device's form of a nested weight (``reference`` says what planes and centroids mean).

    Rows that share an input (q, k and v; gate and up) may be concatenated first: rows are independent.

    Args:
        planes: int32 ``[bits, out, in / 32]``, 2 to 8 planes. Those above the highest precision of ``centroids`` are
            not kept.
        centroids: for each precision wanted, ``[out, groups, 2**bits]``; rounded to ``dtype`` first.
        dtype: float16 or bfloat16, of the inputs that will come.

    Raises:
        ValueError: shapes that do not agree, or what the kernels do not do (the message names it).
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: the CUDA kernels take float16 and bfloat16")
    if not centroids or min(centroids) < MIN_BITS or max(centroids) > MAX_BITS:
        raise ValueError(f"bits={sorted(centroids)}: the CUDA kernels do {MIN_BITS} to {MAX_BITS}; drop the others")
    if in_features % WORD_BITS or not 0 < in_features <= MAX_IN_FEATURES:
        raise ValueError(f"in_features={in_features} must be a multiple of {WORD_BITS} <= {MAX_IN_FEATURES} on a GPU")
    if group_size is not None and group_size % WORD_BITS:
        raise ValueError(f"group_size={group_size} must be a multiple of {WORD_BITS} on a GPU, or None")
    tables, scales = {}, {}
    for bits, table in sorted(centroids.items()):
        check_format(planes, table, bits, in_features, group_size)
        tables[bits], scales[bits] = _integer_tables(table.to(dtype).float(), bits)
    whole_rows = next(iter(centroids.values())).shape[1] == 1
    bytes_at_2 = None
    if BYTE_BITS in centroids and whole_rows:
        bytes_at_2 = _byte_tables(centroids[BYTE_BITS].to(dtype).squeeze(1), planes)
    return DeviceWeight(
        _pack(planes[: max(centroids)]),
        tables,
        scales,
        bytes_at_2,
        planes.shape[1],
        in_features,
        None if whole_rows else group_size,
        dtype,
    )._written()


def _pack(planes: Tensor) -> Tensor:
    planes = torch.nn.functional.pad(planes, (0, 0, 0, -planes.shape[1] % TILE))
    bytes_of = [[_spread((plane >> 8 * p) & 0xFF) for p in range(4)] for plane in planes]
    pairs = [_merge([(bytes_of[0][p], 2 * (p % 2) + 1) for p in half] + [(bytes_of[1][p], 2 * (p % 2)) for p in half])
             for half in ((0, 1), (2, 3))]  # fmt: skip
    parts = [_lane_order(torch.stack(pairs, dim=-1))]
    for plane in bytes_of[2:]:
        parts.append(_lane_order(_merge(list(zip(plane, PLANE_BIT, strict=True)))[..., None]))
    return torch.cat(parts)


def _merge(parts: list[tuple[Tensor, int]]) -> Tensor:
    """The words' bits, each shifted left by its number, in one word."""
    word = torch.zeros_like(parts[0][0])
    for part, shift in parts:
        word |= part << shift
    return word


def _spread(byte: Tensor) -> Tensor:
    """Bit n of a byte at bit 4 * n."""
    byte = (byte | byte << 12) & 0x000F000F
    byte = (byte | byte << 6) & 0x03030303
    return (byte | byte << 3) & 0x11111111


def _lane_order(words: Tensor) -> Tensor:
    """``[rows, in / 32, n]`` as the lanes read it: flat, by tile, unit, row g, word t, row half, n."""
    rows, columns, n = words.shape
    lanes = UNIT // WORD_BITS
    tiles = words.view(rows // TILE, 2, TILE // 2, columns, n)
    whole, parts = columns // lanes * lanes, []
    for first, last, width in ((0, whole, lanes), (whole, columns, columns - whole)):
        if first < last:
            unit = tiles[:, :, :, first:last].unflatten(3, (-1, width))  # tile, half, g, unit, t, n
            parts.append(unit.permute(0, 3, 2, 4, 1, 5).reshape(rows // TILE, -1))
    return torch.cat(parts, dim=1).flatten()


def _integer_tables(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Tables and scales, as in :class:`DeviceWeight`, of values ``[out, groups, 2**bits]``."""
    base = 128 if EIGHT_ENTRIES_BITS < bits <= REGISTER_BITS else 256
    offset = table.amin(dim=(1, 2))
    scale = (table.amax(dim=(1, 2)) - offset) / (base * base - 1)
    step = torch.where(scale > 0, scale, 1.0)[:, None, None]
    integers = ((table - offset[:, None, None]) / step).round().to(torch.int32)[..., _codes(bits, table.device)]
    high, low = (integers // base).to(torch.uint8), (integers % base).to(torch.uint8)
    rows = torch.cat([high, low], dim=-1) if bits <= REGISTER_BITS else torch.stack([low, high], dim=-1).flatten(2)
    return _tiles(rows, torch.stack([scale, offset], dim=1))


def _tiles(rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Tables ``[out, groups, bytes]`` of rows, and scales ``[out, 2]``, by tiles."""
    out_features, groups, size = rows.shape
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -out_features % TILE))
    tiles = rows.view(-1, TILE, groups, size).transpose(1, 2).contiguous()
    return tiles, torch.nn.functional.pad(scales, (0, 0, 0, -out_features % TILE))


def _byte_tables(table: Tensor, planes: Tensor) -> tuple[Tensor, Tensor] | None:
    """Tables and scales of bytes for values ``[out, 4]``, as :class:`DeviceWeight` says.

    For each of the largest integers 128 to 255 that a row's values may be spread to (of a smaller one that fits, a
    multiple does) the integers nearest to the values, and the scale and offset that fit these best in the mean square
    over the row's weights; the best of them.
    """
    table, shares = table.double(), _shares(planes)
    parts = [_nearest_bytes(*rows) for rows in zip(table.split(ROWS_AT_ONCE), shares.split(ROWS_AT_ONCE), strict=True)]
    integers, scales, errors = (torch.cat(of) for of in zip(*parts, strict=True))
    squares = (shares * table**2).sum(1)
    cost = float((errors / torch.where(squares > 0, squares, 1.0)).mean().sqrt())
    if not cost <= BYTE_ERROR:  # nor if it is not a number
        log.info(
            "a weight of %d rows has no tables of bytes: they would cost %.1e, above %.0e", len(table), cost, BYTE_ERROR
        )
        return None
    rows = integers[:, _codes(BYTE_BITS, table.device)].to(torch.uint8)
    return _tiles(rows[:, None], scales.float())


def _nearest_bytes(table: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``[rows, 4]``, scales and offsets ``[rows, 2]``, and the mean squared errors ``[rows]``."""
    lowest = table.amin(1, keepdim=True)
    spread = table.amax(1, keepdim=True) - lowest
    unit = (table - lowest) / torch.where(spread > 0, spread, 1.0)
    largest = torch.arange(128, 256, device=table.device, dtype=table.dtype)[:, None]
    integers = (unit[:, None] * largest).round()  # [rows, 128, 4]
    share = shares[:, None]
    mean = (share * integers).sum(2, keepdim=True)
    value = (share * table[:, None]).sum(2, keepdim=True)
    off, wanted = integers - mean, table[:, None] - value
    variance = (share * off * off).sum(2, keepdim=True)
    scale = (share * off * wanted).sum(2, keepdim=True) / torch.where(variance > 0, variance, 1.0)
    errors = (share * (wanted - scale * off) ** 2).sum(2)
    best = errors.argmin(1)
    row = torch.arange(len(table), device=table.device)
    scales = torch.cat([scale, value - scale * mean], dim=2)
    return integers[row, best], scales[row, best], errors[row, best]


def _shares(planes: Tensor) -> Tensor:
    """Of each row's weights, those with each of the four codes at 2 bits: float64 ``[out, 4]``."""
    upper, lower, both = (_ones(words).sum(1).double() for words in (planes[0], planes[1], planes[0] & planes[1]))
    weights = WORD_BITS * planes.shape[2]
    return torch.stack([weights - upper - lower + both, lower - both, upper - both, both], dim=1) / weights


def _ones(words: Tensor) -> Tensor:
    """Bits that are set in each of int32 ``words``."""
    words = words - ((words >> 1) & 0x55555555)  # of two bits, then of four, of bytes, of all
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def _codes(bits: int, device: torch.device) -> Tensor:
    """The code of each table index."""
    index = torch.arange(1 << bits, device=device)
    code = torch.zeros_like(index)
    for plane in range(bits):
        code |= ((index >> (1 - plane if plane < 2 else plane)) & 1) << (bits - 1 - plane)
    return code
