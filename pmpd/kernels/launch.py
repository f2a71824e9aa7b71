"""How many blocks and warps a product with a nested weight gets, by which method, and what shared memory they need.

``launches.csv`` has what was fastest on an H100 for each of some shapes, precisions and numbers of rows, method by
method (``benchmarks/launches.py`` measures it; ``docs/kernels.md`` says how its rows came about); another product gets
the launch of the nearest shape. Nothing is tuned at a user's first call. It launches nothing.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass, replace
from importlib import resources

from pmpd.kernels.device import REGISTER_BITS, TILE

STEP = 256
"""Columns that a warp copies at once."""
DIGITS = 2
"""Bytes that hold an input."""
MAX_ROWS = 8
"""Rows of x that one launch multiplies."""
PLANES_WARPS = (6, 8, 12, 16)
"""Of a block, that a kernel by bit planes is compiled for: with more warps a thread has fewer registers."""
LOOKUP_WARPS = (8, 12, 16)
"""The same by look-up."""
CHUNK = 6
"""Steps of x that a warp may have in registers at once."""
NORM_CHUNKS = {8: 6, 12: 4, 16: 2}
"""The same by look-up with a norm, which makes floats of x early, by the warps that the kernel is compiled for."""
MAX_WARPS = max(PLANES_WARPS)
PLANES_MAX_BITS = 4
"""Above, bit planes, which take 2**bits - 1 products of planes, would take more than look-up takes. They take one
row of x: for several, look-up is faster or nearly as fast (``docs/kernels.md``)."""
SPREAD_COLUMNS = 9
"""Columns for each entry of a table, from which on spreading tables over lanes takes less time than it saves: measured
at 6 and 8 bits with 576 to 11008 columns."""
RESERVED_BYTES = 1024
"""What the driver keeps of a block's shared memory, beside what a block may have."""


@dataclass(frozen=True)
class Launch:
    """Attributes:
    splits: warps that share a tile of 16 rows, each with its part of the columns.
    teams: groups of ``splits`` warps, each with its own tiles; they also share the rows of x.
    stages: steps of weights that a warp has under way.
    early: of these, steps asked for before earlier kernels have ended.
    late: when the next kernel may come: 0 once the early steps are asked for, 1 once earlier kernels have ended, 2 once
        x is here, 3 once a warp is at its last tile.
    alone: let no two blocks of such kernels share a processor.
    planes: multiply by bit planes (``nested_planes.cu``), not by look-up.
    cluster: blocks that share tiles, each with a part of the ``splits``; a block has room for its own columns of x
        alone.
    hold: clocks that a block waits before it asks for its early steps, for the x of the kernel before not to queue
        behind them; lost if that one has ended.
    spread: above five bits, by look-up, with a table a row and columns enough: let each lane have its own copy of a
        tile's tables, of which two lanes share a bank (in one table for all about 3.5 meet). Lost where there is no
        memory for it.
    blocks: 0 for one a processor.
    rows: of x at a time.
    """

    splits: int
    teams: int
    stages: int = 2
    early: int = 2
    late: int = 2
    alone: bool = False
    planes: bool = False
    cluster: int = 1
    hold: int = 0
    spread: bool = True
    blocks: int = 0
    rows: int = MAX_ROWS

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.splits // self.cluster * self.teams

    @property
    def capacity(self) -> int:
        """Rows of x that the kernel is compiled for: 1, 2, 4 or 8."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def max_warps(self) -> int:
        """What the kernel is compiled for: with few warps a thread may have more registers.

        One row by look-up does without: with those for ``MAX_WARPS`` hardly anything of it spills, unless tables are of
        groups.
        """
        if not self.planes and self.capacity == 1:
            return MAX_WARPS
        compiled = PLANES_WARPS if self.planes else LOOKUP_WARPS
        return next((most for most in compiled if self.warps <= most), MAX_WARPS)

    def most_tiles(self, out_features: int) -> int:
        """Of a cluster."""
        return _up(_up(out_features, TILE), self.blocks // self.cluster)

    def kept_steps(self, in_features: int) -> int:
        """Steps of x that a block has room for: those of its own splits."""
        steps = _up(in_features, STEP)
        return steps if self.cluster == 1 else _up(steps, self.splits) * (self.splits // self.cluster)

    def chunk(self, in_features: int, *, norm: bool) -> tuple[int, bool]:
        """Steps of x that a warp has in registers at once, and whether those are all that it has."""
        most = NORM_CHUNKS[self.max_warps] if norm and not self.planes else CHUNK
        own = _up(_up(in_features, STEP), self.splits)
        return min(own, most), own <= most

    def whole(self, out_features: int, in_features: int) -> bool:
        """Whether ``stages`` are all the steps of weights that a warp has."""
        return _up(self.most_tiles(out_features), self.teams) * _up(_up(in_features, STEP), self.splits) <= self.stages

    def shared_bytes(self, bits: int, out_features: int, in_features: int, groups: int) -> int:
        """Shared memory of a block: what has a fixed size, rings of weights, columns of x, sums, scales and tables."""
        fixed = fixed_bytes(self.capacity, self.max_warps, self.cluster)
        tiles = self.most_tiles(out_features)
        ring = self.warps * self.stages * TILE * STEP * bits // 8
        columns = self.capacity * DIGITS * (self.kept_steps(in_features) * STEP + 16)
        partial = tiles * (self.splits // self.cluster + self.cluster - 1)
        tables = TILE * ((4 if self.planes else 2) << bits) if groups == 1 else 0
        spread = self.teams * TILE * (8 << bits) if self.spreads(bits, in_features, groups) else 0
        partial *= self.capacity * TILE * 4
        return fixed + ring + columns + partial + tiles * (TILE * 8 + tables) + spread

    def spreads(self, bits: int, in_features: int, groups: int) -> bool:
        """Whether a team spreads a tile's tables over its lanes."""
        enough = in_features >= SPREAD_COLUMNS << bits
        return self.spread and bits > REGISTER_BITS and groups == 1 and enough


def fixed_bytes(rows: int, warps: int, cluster: int) -> int:
    """Shared memory that no shape changes: for each row three numbers a warp and one a block, and a barrier."""
    return 128 * _up(rows * (12 * warps + 4 * cluster) + 8, 128)


def reserved_bytes(shared: int, *, alone: bool) -> int:
    """Dynamic shared memory of a block that decides what else its processor takes; ``shared`` is the most for a block.

    A kernel that starts while its predecessor ends takes what room there is, and two of its blocks on one processor
    take twice as long. That does not pass: the next kernel finds its room on the processors that were left out. So
    kernels of two kinds take turns in a chain. Of those ``alone`` a processor takes one block, as that needs more than
    half of it; the others' leave room for just one of these.
    """
    half = (shared + RESERVED_BYTES) // 2
    return half + 4096 if alone else half - 4096 - 2 * RESERVED_BYTES


def choose(
    out_features: int,
    in_features: int,
    bits: int,
    rows: int,
    processors: int,
    *,
    chain: bool = False,
    planes: bool = True,
    clusters: bool = True,
) -> Launch:
    """The launch for a product, before :func:`fit`: what was fastest for the nearest shape that was measured.

    Args:
        chain: whether kernels before and after take turns (:func:`reserved_bytes`), as in a model's step.
        planes: whether the GPU and the weight can do with bit planes.
        clusters: whether the GPU has clusters of blocks.
    """
    capacity = 1 << (min(rows, MAX_ROWS) - 1).bit_length()
    return _choose(out_features, in_features, bits, capacity, processors, chain, planes, clusters)


@functools.cache
def _choose(
    out_features: int,
    in_features: int,
    bits: int,
    rows: int,
    processors: int,
    chain: bool,
    planes: bool,
    clusters: bool,
) -> Launch:
    steps, tiles = _up(in_features, STEP), _up(out_features, TILE) / processors

    def distance(row: Measured) -> tuple[float, ...]:
        shape = abs(math.log(row.steps / steps)) + abs(math.log(row.tiles_a_processor / tiles))
        return abs(row.bits - bits), abs(math.log2(row.rows / rows)), shape, row.microseconds

    def can(row: Measured) -> bool:
        launch = row.launch
        planes_too = planes and bits <= PLANES_MAX_BITS
        return row.chain == chain and (planes_too or not launch.planes) and (clusters or launch.cluster == 1)

    return within(min(filter(can, measured()), key=distance).launch, steps)


def within(launch: Launch, steps: int) -> Launch:
    """``launch`` with no more splits than a row has steps."""
    cluster = launch.cluster if launch.cluster <= steps else 1
    splits = min(launch.splits // launch.cluster, steps // cluster) * cluster
    return replace(launch, splits=splits, cluster=cluster)


@dataclass(frozen=True)
class Measured:
    """A row of ``launches.csv``: of a GPU with ``tiles_a_processor`` tiles of 16 rows for each of its processors.

    ``microseconds`` are of the product, or in a chain of the step (in older rows the block) that its descent ended in;
    infinite where they are not known.
    """

    chain: bool
    bits: int
    rows: int
    steps: int
    tiles_a_processor: float
    launch: Launch
    microseconds: float


@functools.cache
def measured() -> tuple[Measured, ...]:
    """What ``launches.csv`` has."""
    with resources.files("pmpd.kernels").joinpath("launches.csv").open(encoding="utf-8") as file:
        return tuple(parse(row) for row in csv.DictReader(file))


def parse(row: dict[str, str]) -> Measured:
    """A row of such a file."""
    launch = Launch(
        splits=int(row["splits"]),
        teams=int(row["teams"]),
        stages=int(row["stages"]),
        early=int(row["early"]),
        hold=int(row["hold"]),
        late=int(row["late"]),
        alone=row["alone"] == "1",
        planes=row["planes"] == "1",
        cluster=int(row["cluster"]),
    )
    return Measured(
        row["chain"] == "1",
        int(row["bits"]),
        int(row["m"]),
        _up(int(row["in_features"]), STEP),
        _up(int(row["out_features"]), TILE) / int(row["processors"]),
        launch,
        float(row["median"] or math.inf),
    )


def fit(
    launch: Launch, bits: int, out_features: int, in_features: int, groups: int, rows: int, blocks: int, shared: int
) -> Launch:
    """``launch`` made smaller until its shared memory is at most ``shared``.

    Columns of many rows of x, many tiles of a block and fat tables do not always fit; then there are fewer of them at a
    time. Spread tables go first: a launch of ``launches.csv`` has them where it leaves room for them, and sweeps try it
    so. Bit planes take one row. ``blocks`` is the number of processors.

    Raises:
        ValueError: ``in_features`` is too large for this GPU.
    """
    most_rows = 1 if launch.planes else MAX_ROWS
    blocks = max(1, blocks // launch.cluster) * launch.cluster
    launch = replace(launch, blocks=blocks, rows=min(rows, launch.rows, most_rows))
    while launch.shared_bytes(bits, out_features, in_features, groups) > shared:
        if launch.spreads(bits, in_features, groups):
            launch = replace(launch, spread=False)
        elif launch.stages > 2:
            launch = replace(launch, stages=launch.stages - 1, early=min(launch.early, launch.stages - 1))
        elif launch.teams > 1:
            launch = replace(launch, teams=launch.teams - 1)
        elif launch.blocks // launch.cluster * TILE < out_features:
            launch = replace(launch, blocks=2 * launch.blocks)
        elif launch.rows > 1:
            launch = replace(launch, rows=launch.capacity // 2)
        elif launch.splits > launch.cluster:
            launch = replace(launch, splits=launch.splits // 2 // launch.cluster * launch.cluster or launch.cluster)
        else:
            raise ValueError(f"in_features={in_features} needs more shared memory than the {shared} bytes of this GPU")
    return launch


def _up(a: int, b: int) -> int:
    return (a + b - 1) // b
