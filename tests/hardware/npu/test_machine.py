"""Impossible machines are refused by name, with what is allowed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pmpd.hardware.npu import NPU, StoredWeights
from tests.hardware.npu.plain import LARGE

POSITIVE = [
    "num_macs",
    "clock_hz",
    "bandwidth_bytes_s",
    "matrix_tile_tokens",
    "matrix_vector_tile_inputs",
    "vector_lanes",
    "activation_bits",
    "kv_bits",
    "head_bits",
    "table_entry_bits",
    "activation_buffer_bytes",
]
SHARES = [
    "bandwidth_efficiency",
    "kv_bandwidth_efficiency",
    "region_efficiency",
    "matrix_utilisation",
    "matrix_vector_utilisation",
]


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in POSITIVE for value in (0, -1, float("nan"))]
    + [(name, value) for name in SHARES for value in (0.0, 1.5, float("nan"))]
    + [("scale_bits", -1), ("matrix_fill_cycles", -1)],
)
def test_an_impossible_number_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}={value}: "):
        dataclasses.replace(LARGE, **{field: value})


def test_one_impossible_number_in_an_array_is_enough() -> None:
    with pytest.raises(ValueError, match="bandwidth_bytes_s="):
        dataclasses.replace(LARGE, bandwidth_bytes_s=np.array([1e9, 0.0]))


@pytest.mark.parametrize(
    ("field", "needed"), [("activation_buffer_bytes", 2 * 128 * 16), ("weight_buffer_bytes", 2 * 2 * 16 * 2)]
)
def test_a_buffer_holds_two_tiles(field: str, needed: int) -> None:
    tiles = {"matrix_tile_tokens": 128, "matrix_tile_outputs": 2, "matrix_tile_inputs": 16}
    dataclasses.replace(LARGE, **tiles, **{field: needed})
    with pytest.raises(ValueError, match=f"{field}={needed - 1}: at least {needed}, two tiles"):
        dataclasses.replace(LARGE, **tiles, **{field: needed - 1})


def test_stored_weights_refuse_nothing_to_read() -> None:
    with pytest.raises(ValueError, match="parent_bits=0"):
        StoredWeights(parent_bits=0)
    with pytest.raises(ValueError, match="group_size=-1"):
        StoredWeights(group_size=-1)


def test_what_is_counted_is_said() -> None:
    assert LARGE.counted == "head not counted, tables not counted, KV cache at 8 bits"
    full = NPU("n", 1, 1.0, 1.0, kv_bits=16, count_head=True, head_bits=4, count_tables=True)
    assert full.counted == "head counted at 4 bits, tables counted, KV cache at 16 bits"
