"""How many blocks and warps a product with a nested weight gets, and what shared memory they need.

A function of the shape alone, read off sweeps on an H100 (``benchmarks/nested_matmul.py --sweep``): nothing is tuned
at a user's first call. It launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pmpd.kernels.device import MIN_BITS, REGISTER_BITS, TILE

STEP = 256
"""Columns that a warp copies at once."""
STEPS_IN_REGISTERS = 2
"""Steps of x that a warp has there at once."""
STEPS_BESIDE_PLANES = 6
"""The same where no tables wait in registers."""
DIGITS = 2
"""Bytes that hold an input."""
MAX_ROWS = 8
"""Rows of x that one launch multiplies."""
MAX_WARPS = 16
STATIC_SHARED_BYTES = 4096
"""At least what a block declares itself, and what the driver keeps of it."""
RESERVED_BYTES = 1024
"""What the driver keeps of a block's shared memory."""
SHORT_STEPS = 8
"""Steps of a row up to which a product is over before its launch is forgotten."""
BUSY_BITS = 4
"""From here on arithmetic takes longer than reading."""
FULL = 0.88
"""Share of a round of tiles from which all processors count as busy to the end."""


@dataclass(frozen=True)
class Launch:
    """Attributes:
    splits: warps that share a tile of 16 rows, each with its part of the columns.
    teams: groups of ``splits`` warps, each with its own tiles of the block; they also share the rows of x.
    stages: steps of weights that a warp has under way.
    early: of these, steps asked for before earlier kernels have ended.
    late: let the next kernel come only once x is here.
    alone: let no two blocks of such kernels share a processor.
    blocks: 0 for one a processor.
    rows: of x at a time.
    planes: multiply by bit planes (``nested_planes.cu``), not by look-up.
    """

    splits: int
    teams: int
    stages: int = 2
    early: int = 2
    late: bool = True
    alone: bool = False
    blocks: int = 0
    rows: int = MAX_ROWS
    planes: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.splits * self.teams

    @property
    def capacity(self) -> int:
        """Rows of x that the kernel is compiled for: 1, 2, 4 or 8."""
        return 1 << (self.rows - 1).bit_length()

    def chunk(self, in_features: int) -> tuple[int, bool]:
        """Steps of x that a warp has in registers at once, and whether those are all that it has."""
        most = STEPS_BESIDE_PLANES if self.planes and self.rows == 1 else STEPS_IN_REGISTERS
        own = _up(_up(in_features, STEP), self.splits)
        return min(own, most), own <= most

    def shared_bytes(self, bits: int, out_features: int, in_features: int, groups: int) -> int:
        """Dynamic shared memory of a block: rings of weights, digits of x, partial sums, scales and tables."""
        tiles = _up(_up(out_features, TILE), self.blocks)
        ring = self.splits * self.teams * self.stages * TILE * STEP * bits // 8
        digits = self.capacity * DIGITS * (_up(in_features, STEP) * STEP + 16)
        partial = tiles * self.splits * self.capacity * TILE * 4
        tables = TILE * ((4 if self.planes else 2) << bits) if groups == 1 else 0
        return ring + digits + partial + tiles * (TILE * 8 + tables)


def reserved_bytes(shared: int, *, alone: bool) -> int:
    """Dynamic shared memory of a block that decides what else its processor takes; ``shared`` is the most for a block.

    A kernel that starts while its predecessor ends takes what room there is, and two of its blocks on one processor
    take twice as long. That does not pass: the next kernel finds its room on the processors that were left out. So
    kernels of two kinds take turns in a chain. Of those ``alone`` a processor takes one block, as that needs more than
    half of it; the others' leave room for just one of these.
    """
    half = (shared + RESERVED_BYTES) // 2
    return half + 4096 if alone else half - 4096 - 2 * STATIC_SHARED_BYTES


def choose(out_features: int, in_features: int, bits: int, rows: int, processors: int) -> Launch:
    """The launch for a product, before :func:`fit`.

    There is one block a processor, and what decides is how many tiles that leaves a block. With one, blocks of the next
    kernel must not gather on one processor; with more, they fill the gaps that this one leaves.
    """
    steps, round_of_tiles, full = _shape(out_features, in_features, processors)
    if rows > 1:
        return _several_rows(steps, round_of_tiles, full, bits, rows)
    if round_of_tiles == 1:
        if bits < BUSY_BITS and steps <= SHORT_STEPS:
            return Launch(_even(steps, 4), 1, 2, 1, True)
        return Launch(_even(steps, MAX_WARPS), 1, 1, 1, True, True)
    stages = 3 if steps <= SHORT_STEPS else 2
    if bits == REGISTER_BITS:  # few registers are left for what is under way
        stages -= 1
    if round_of_tiles == 2 and steps > MAX_WARPS:
        most = 11 if full and bits == MIN_BITS else MAX_WARPS
        return Launch(_even(steps, most), 1, stages, stages, full)
    splits = _even(steps, MAX_WARPS // 2 if steps > SHORT_STEPS else 4)
    short = steps <= SHORT_STEPS or round_of_tiles == 2
    if full and (bits < BUSY_BITS or (bits == BUSY_BITS and short)):
        return Launch(splits, min(round_of_tiles, MAX_WARPS // splits), 2, 1, False)
    if round_of_tiles == 2:
        return Launch(_even(steps, MAX_WARPS // 2), 1, 3, 1, True)
    teams = min(3, MAX_WARPS // splits) if round_of_tiles == 3 and bits != REGISTER_BITS else 2
    return Launch(splits, teams, stages, 1, bits > MIN_BITS)


def _several_rows(steps: int, round_of_tiles: int, full: bool, bits: int, rows: int) -> Launch:
    alone = round_of_tiles == 1
    stages = 1 if rows > 4 else 2
    if steps > SHORT_STEPS and (alone or (round_of_tiles == 2 and not full)):
        stages = 1 if alone else stages
        return Launch(_even(steps, MAX_WARPS), 1, stages, stages, False, alone)
    if rows > 2 and round_of_tiles == 2:
        stages = 1
    late = alone or (bits >= BUSY_BITS and steps > SHORT_STEPS and round_of_tiles > 2)
    if steps <= SHORT_STEPS:
        return Launch(_even(steps, 4), min(4, max(rows, round_of_tiles)), stages, stages, late, alone)
    return Launch(_even(steps, MAX_WARPS // 2), 2, stages, stages, late, alone)


def choose_in_chain(out_features: int, in_features: int, bits: int, processors: int) -> Launch:
    """The launch, before :func:`fit`, for one row of x and kernels before and after that take turns
    (:func:`reserved_bytes`): they cannot gather, so the next one may come early."""
    steps, round_of_tiles, _ = _shape(out_features, in_features, processors)
    if round_of_tiles == 1:
        return Launch(_even(steps, MAX_WARPS), 1, 1, 1, False)
    if steps <= SHORT_STEPS:
        return Launch(_even(steps, 4), min(3, round_of_tiles), 1, 1, False)
    stages = 1 if bits == REGISTER_BITS else 2
    late = bits >= BUSY_BITS  # else the next kernel's weights come before this one's x
    if round_of_tiles > 2:
        return Launch(_even(steps, MAX_WARPS // 2), 2, stages, stages, late)
    if steps > MAX_WARPS:
        return Launch(_even(steps, MAX_WARPS), 1, stages, stages, late)
    return Launch(_even(steps, MAX_WARPS // 2), 1 if late else 2, stages, 1, late)


def _shape(out_features: int, in_features: int, processors: int) -> tuple[int, int, bool]:
    """Steps of a row; tiles of the busiest block; whether almost all blocks have as many."""
    tiles = _up(out_features, TILE)
    round_of_tiles = _up(tiles, processors)
    return _up(in_features, STEP), round_of_tiles, tiles >= FULL * round_of_tiles * processors


def fit(
    launch: Launch, bits: int, out_features: int, in_features: int, groups: int, rows: int, blocks: int, shared: int
) -> Launch:
    """``launch`` made smaller until its shared memory is at most ``shared``.

    Columns of many rows of x, many tiles of a block and fat tables do not always fit; then there are fewer of them at a
    time. ``blocks`` is the number of processors.

    Raises:
        ValueError: ``in_features`` is too large for this GPU.
    """
    launch = replace(launch, blocks=blocks, rows=min(rows, launch.rows))
    while launch.shared_bytes(bits, out_features, in_features, groups) > shared - STATIC_SHARED_BYTES:
        if launch.teams > 1:
            launch = replace(launch, teams=launch.teams // 2)
        elif launch.blocks * TILE < out_features:
            launch = replace(launch, blocks=2 * launch.blocks)
        elif launch.rows > 1:
            launch = replace(launch, rows=launch.capacity // 2)
        elif launch.splits > 1:
            launch = replace(launch, splits=launch.splits // 2)
        else:
            raise ValueError(f"in_features={in_features} needs more shared memory than the {shared} bytes of this GPU")
    return launch


def _even(steps: int, most: int) -> int:
    """Fewest splits that leave the busiest as few steps as ``most`` splits would."""
    return _up(steps, _up(steps, most))


def _up(a: int, b: int) -> int:
    return (a + b - 1) // b
