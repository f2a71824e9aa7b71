"""Gains under changed assumptions: bounds, directions, and the base that they leave from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pmpd.hardware.npu import NPU
from pmpd.report.npu.sweeps import cases, machine_gain, sweep


@pytest.fixture(scope="module")
def rows(npus: list[NPU]) -> pd.DataFrame:
    return sweep(npus)


def gain(rows: pd.DataFrame, name: str, variant: str, model: str = "vicuna7b", over: str = "decode_speedup"):
    own = rows[(rows["sweep"] == name) & (rows.variant == variant) & (rows.model == model) & (rows.quantity == over)]
    return own.set_index("at").value


def test_gains_lie_between_one_and_the_ratio_of_bits(rows: pd.DataFrame) -> None:
    gains = rows[rows.quantity == "decode_speedup"]
    assert (gains.value >= 1 - 1e-12).all()
    assert (gains.value <= 16 / gains.weight_bits + 1e-12).all()


def test_every_sweep_leaves_from_the_papers_case(rows: pd.DataFrame) -> None:
    base = float(gain(rows, "kv_cache", "8 bits").iloc[0])
    assert gain(rows, "batch", "1100 tokens of context")[1] == pytest.approx(base)
    assert gain(rows, "layout", "only the step's planes").iloc[0] == pytest.approx(base)
    assert np.interp(1100, *zip(*gain(rows, "context", "KV 8 bits").items(), strict=True)) == pytest.approx(
        base, rel=0.01
    )


def test_heads_caches_contexts_and_batches_all_take_from_the_gain(rows: pd.DataFrame) -> None:
    heads = [
        gain(rows, "head", v).iloc[0] for v in ("as in the paper", "head counted, 8 bits", "head counted, 16 bits")
    ]
    assert heads == sorted(heads, reverse=True)
    caches = [gain(rows, "kv_cache", f"{b} bits").iloc[0] for b in (4, 8, 16)]
    assert caches == sorted(caches, reverse=True)
    for name, variant in (("context", "KV 8 bits"), ("context", "KV 16 bits"), ("batch", "1100 tokens of context")):
        assert gain(rows, name, variant).is_monotonic_decreasing


def test_a_layout_that_reads_all_planes_gains_nothing_over_high(rows: pd.DataFrame) -> None:
    for parent in ("high bits", "8 bits"):
        values = gain(rows, "layout", f"all planes of a parent at {parent}", over="decode_gain_over_high")
        assert values.iloc[0] == pytest.approx(1.0)


def test_prefill_above_low_bits_is_free_from_a_length_on(rows: pd.DataFrame) -> None:
    own = rows[(rows["sweep"] == "prefill") & (rows.model == "vicuna7b") & (rows.weight_bits == 16)]
    whole = own[own.variant == "everything on chip"].set_index("at").value
    # 16384 MACs at 1 GHz take as long as reading 2 bytes at 32 GB/s for 1024 tokens.
    assert whole[512] > 1
    assert whole[1024] == pytest.approx(0, abs=1e-9)
    assert own[own.variant == "1 MiB buffers"].set_index("at").value[1024] > 10


def test_the_map_of_machines_holds_the_single_machine(npus: list[NPU]) -> None:
    case = cases(npus)[0]
    both = machine_gain(case, np.array([16384.0, 256.0]), np.array([32e9, 4e12]))
    assert both.shape == (2, 2)
    assert both[0, 0] == pytest.approx(6.94, abs=0.01)  # bound by memory
    assert both[1, 1] == pytest.approx(1.0)  # bound by arithmetic: bits gain nothing
