"""The constants of a neural processing unit and of the weights that it reads, and which of them are impossible.

Every number of :class:`NPU` may be an array: results broadcast over it, so one call sweeps a whole design space.
Knows neither models nor operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pmpd.records import FP16_BITS

Number = float | NDArray[np.float64]

BUFFER_HALVES = 2
"""Double buffering: one half of a buffer is worked on while the other half is filled."""


@dataclass(frozen=True)
class NPU:
    """A machine with a multiply-accumulate array in two modes, a vector unit, on-chip buffers and one memory.

    The array takes a tile a cycle: in matrix mode ``matrix_tile_tokens`` x ``matrix_tile_outputs`` x
    ``matrix_tile_inputs``, in matrix-vector mode one token x outputs x inputs. A dimension is padded to its tile.
    Where there are several arrays the tile is that of one, and the outputs are shared among them.

    Attributes:
        num_macs: multiply-accumulate units.
        bandwidth_bytes_s: of external memory.
        bandwidth_efficiency: share of it that weights and activations reach, (0, 1].
        kv_bandwidth_efficiency: the same for the KV cache, whose reads are scattered; None: as for weights.
        region_efficiency: share of the sum of its regions (dies) that they give together: units, lanes and memory.
        matrix_utilisation: share of the units busy in matrix-matrix products, beside padding.
        matrix_vector_utilisation: the same in matrix-vector products.
        matrix_fill_cycles: lost at every pair of output and input tile (a systolic array that fills and drains).
        vector_lanes: elements a cycle of the vector unit; None: norms, softmax and activations take no time.
        activation_bits, kv_bits: of one activation; of one cached key or value element.
        activation_buffer_bytes: None: every activation stays on chip.
        weight_buffer_bytes: None: a whole weight matrix fits.
        count_head, head_bits: charge the output head, and its precision whatever the blocks' is.
        count_tables: charge what turns an index into a weight: ``table_entry_bits`` for each of 2^bits centroids, and
            ``scale_bits``, for every row of a matrix or every group of it. The unquantised model has none.
        nested_layout: bit planes lie apart, so b bits read b planes; if not, every step reads all of the parent.

    Raises:
        ValueError: a number outside its range, or a buffer that is smaller than two tiles.
    """

    name: str
    num_macs: Number
    clock_hz: Number
    bandwidth_bytes_s: Number
    bandwidth_efficiency: Number = 1.0
    kv_bandwidth_efficiency: Number | None = None
    region_efficiency: Number = 1.0
    matrix_utilisation: Number = 1.0
    matrix_tile_tokens: Number = 1
    matrix_tile_outputs: Number = 1
    matrix_tile_inputs: Number = 1
    matrix_fill_cycles: Number = 0
    matrix_vector_utilisation: Number = 1.0
    matrix_vector_tile_outputs: Number = 1
    matrix_vector_tile_inputs: Number = 1
    vector_lanes: Number | None = None
    activation_bits: Number = 8
    kv_bits: Number = 8
    activation_buffer_bytes: Number | None = None
    weight_buffer_bytes: Number | None = None
    count_head: bool = False
    head_bits: Number = FP16_BITS
    count_tables: bool = False
    table_entry_bits: Number = 16
    scale_bits: Number = 0
    nested_layout: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or isinstance(value, bool) or value is None:
                continue
            if field.name.endswith(("_efficiency", "_utilisation")):
                _refuse_unless((np.asarray(value) > 0) & (np.asarray(value) <= 1), field.name, value, "(0, 1]")
            elif field.name in ("scale_bits", "matrix_fill_cycles"):
                _refuse_unless(np.asarray(value) >= 0, field.name, value, "0 or more")
            else:
                _refuse_unless(np.asarray(value) > 0, field.name, value, "more than 0")
        self._refuse_small_buffers()

    @property
    def counted(self) -> str:
        """What enters the estimate beside the blocks' weights, in words for a table's unit."""
        head = f"head counted at {self.head_bits:g} bits" if self.count_head else "head not counted"
        tables = "tables counted" if self.count_tables else "tables not counted"
        return f"{head}, {tables}, KV cache at {self.kv_bits:g} bits"

    def _refuse_small_buffers(self) -> None:
        inputs = np.asarray(self.matrix_tile_inputs)
        for name, tile_bytes in (
            ("activation_buffer_bytes", self.matrix_tile_tokens * inputs * self.activation_bits / 8.0),
            ("weight_buffer_bytes", self.matrix_tile_outputs * inputs * FP16_BITS / 8.0),
        ):
            buffer, needed = getattr(self, name), BUFFER_HALVES * np.max(tile_bytes)
            if buffer is not None:
                _refuse_unless(
                    np.asarray(buffer) >= BUFFER_HALVES * tile_bytes,
                    name,
                    buffer,
                    f"at least {needed:g}, two tiles of the array in matrix mode",
                )


@dataclass(frozen=True)
class StoredWeights:
    """How the weights lie in memory.

    Attributes:
        parent_bits: bits a weight of the nested model, planes and outliers, the most that a step may read; None: not
            nested, any precision.
        group_size: inputs that share a table; None: a whole row.

    Raises:
        ValueError: a number outside its range.
    """

    parent_bits: float | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("parent_bits", "group_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: more than 0, or None")


def _refuse_unless(possible: NDArray[np.bool_], name: str, value: object, allowed: str) -> None:
    if not np.all(possible):
        raise ValueError(f"{name}={value}: {allowed}")
