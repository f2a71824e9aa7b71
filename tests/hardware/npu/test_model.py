"""Forwards and schedules against a loop over operations in Python numbers, and against sums done by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpd.hardware.npu import (
    NPU,
    StoredWeights,
    decode_forward,
    decode_steps_s,
    generation_s,
    prefill_forward,
    published_shapes,
    tokens_per_s,
)
from pmpd.records import Architecture
from tests.hardware.npu.plain import LARGE, SMALL, TINY, UNIT, plain_forward_s

VICUNA, PHI = published_shapes()["vicuna7b"], published_shapes()["phi1_5"]


def decode_s(npu: NPU, shape: Architecture, bits, context, **more) -> np.ndarray:
    return decode_forward(npu, shape, bits, context, **more).total_s


NPUS = st.builds(
    NPU,
    name=st.just("any"),
    num_macs=st.integers(1, 1 << 16),
    clock_hz=st.floats(1e3, 1e9),
    bandwidth_bytes_s=st.floats(1e3, 1e12),
    bandwidth_efficiency=st.floats(0.1, 1),
    kv_bandwidth_efficiency=st.none() | st.floats(0.1, 1),
    region_efficiency=st.floats(0.1, 1),
    matrix_utilisation=st.floats(0.1, 1),
    matrix_tile_tokens=st.integers(1, 9),
    matrix_tile_outputs=st.integers(1, 9),
    matrix_tile_inputs=st.integers(1, 9),
    matrix_fill_cycles=st.integers(0, 20),
    matrix_vector_utilisation=st.floats(0.1, 1),
    matrix_vector_tile_outputs=st.integers(1, 9),
    matrix_vector_tile_inputs=st.integers(1, 9),
    vector_lanes=st.none() | st.integers(1, 64),
    activation_bits=st.sampled_from([8, 16]),
    kv_bits=st.sampled_from([4, 8, 16]),
    activation_buffer_bytes=st.none() | st.integers(400, 4000),
    weight_buffer_bytes=st.none() | st.integers(400, 4000),
    count_head=st.booleans(),
    head_bits=st.sampled_from([4, 16]),
    count_tables=st.booleans(),
    scale_bits=st.sampled_from([0, 32]),
    nested_layout=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(
    npu=NPUS,
    bits=st.sampled_from([2, 2.39, 3, 4, 16]),
    new=st.integers(1, 40),
    past=st.integers(0, 40),
    batch=st.integers(1, 4),
    group=st.none() | st.just(5),
)
def test_a_forward_is_the_sum_of_its_operations(npu, bits, new, past, batch, group):
    weights = StoredWeights(parent_bits=6, group_size=group)
    expected = plain_forward_s(npu, TINY, bits, 1, past + 1, batch, 6, group)
    assert decode_s(npu, TINY, bits, past + 1, weights=weights, batch=batch) == pytest.approx(expected, rel=1e-12)
    expected = plain_forward_s(npu, TINY, bits, new, new, batch, 6, group)
    assert prefill_forward(npu, TINY, bits, new, weights, batch).total_s == pytest.approx(expected, rel=1e-12)


def test_decode_step_by_hand() -> None:
    # Two blocks of 64 and 32 weights at 4 bits: 96 bytes. Keys, and values: 2 layers x 4 wide x 3 tokens: 24 bytes.
    fast = dataclasses.replace(UNIT, num_macs=10_000)
    assert decode_s(fast, TINY, 4, 3) == pytest.approx((96 + 2 * 24) / 100)
    assert decode_s(dataclasses.replace(fast, kv_bits=16), TINY, 4, 3) == pytest.approx((96 + 96) / 100)
    assert decode_s(dataclasses.replace(fast, bandwidth_efficiency=0.5), TINY, 4, 3) == pytest.approx(2.88)
    assert decode_s(dataclasses.replace(fast, kv_bandwidth_efficiency=0.5), TINY, 4, 3) == pytest.approx(1.92)
    head = dataclasses.replace(fast, count_head=True, head_bits=8)
    assert decode_s(head, TINY, 4, 3) == pytest.approx((96 + 48 + 80) / 100)
    # 192 multiply-accumulates of weights and 2 x 2 x 8 x 3 of attention at 10 a second, all above the memory's time.
    assert decode_s(UNIT, TINY, 4, 3) == pytest.approx((192 + 96) / 10)
    assert decode_s(dataclasses.replace(UNIT, region_efficiency=0.5), TINY, 4, 3) == pytest.approx(57.6)


def test_each_operation_takes_the_longer_of_its_own_two_times() -> None:
    # 64 weights: 6.4 s of arithmetic; at 16 bits 128 bytes, 12.8 s. 32 weights alike. A sum over operations of maxima:
    wide = dataclasses.replace(UNIT, bandwidth_bytes_s=10.0)
    assert decode_forward(wide, TINY, 16, 0).linears_s == pytest.approx(2 * (12.8 + 6.4))
    # With attention bound by arithmetic and linears by memory the total exceeds both whole-forward bounds.
    step = decode_forward(wide, TINY, 16, 3)
    assert step.total_s > max((192 + 96) / 10, (384 + 48) / 10)


def test_prefill_reads_weights_once_and_attends_causally() -> None:
    # 3 tokens: 3 x 192 MACs of weights, 2 layers x 2 products x 8 wide x 6 pairs.
    assert prefill_forward(UNIT, TINY, 4, 3).total_s == pytest.approx((576 + 192) / 10)
    fast = dataclasses.replace(UNIT, num_macs=10_000)
    assert prefill_forward(fast, TINY, 4, 3).total_s == pytest.approx((96 + 48) / 100)
    head = dataclasses.replace(UNIT, count_head=True)
    assert prefill_forward(head, TINY, 4, 3).head_s == pytest.approx(80 / 10)  # the last position only


def test_prefill_at_high_precision_is_nearly_free() -> None:
    npu = dataclasses.replace(LARGE, matrix_utilisation=0.8, matrix_vector_utilisation=0.25)
    high, low = (float(prefill_forward(npu, VICUNA, bits, 1024).total_s) for bits in (16, 2))
    assert high == low == pytest.approx(0.51, abs=0.02)  # bound by arithmetic at any precision


def test_one_token_of_prefill_is_one_decode_step() -> None:
    for npu in (UNIT, dataclasses.replace(UNIT, num_macs=10_000, count_head=True)):
        assert prefill_forward(npu, TINY, 4, 1).total_s == pytest.approx(float(decode_s(npu, TINY, 4, 1)))


def test_a_layout_that_is_not_nested_saves_nothing_at_low_bits() -> None:
    flat, weights = dataclasses.replace(LARGE, nested_layout=False), StoredWeights(parent_bits=8)
    times = decode_s(flat, VICUNA, np.array([2, 3, 8]), 0, weights=weights)
    assert np.ptp(times) == 0.0
    assert times[0] == decode_s(LARGE, VICUNA, 8, 0)
    assert decode_s(flat, VICUNA, 16, 0, weights=weights) == decode_s(LARGE, VICUNA, 16, 0)
    with pytest.raises(ValueError, match="parent_bits=None"):
        decode_s(flat, VICUNA, 2, 0)


def test_a_batch_shares_the_weights_but_not_the_cache() -> None:
    one, eight = (decode_forward(LARGE, VICUNA, 4, 1000, batch=b) for b in (1, 8))
    assert eight.linears_s == one.linears_s
    assert eight.attention_s == pytest.approx(8 * one.attention_s)


def test_grouped_query_heads_read_a_smaller_cache() -> None:
    grouped = dataclasses.replace(VICUNA, num_kv_heads=8)
    assert decode_forward(LARGE, VICUNA, 4, 1000).attention_s == pytest.approx(
        4 * decode_forward(LARGE, grouped, 4, 1000).attention_s
    )


def test_tables_cost_what_their_entries_say() -> None:
    # ic = 2048 at 4 bits: 16 entries x 16 bits / 2048 = 0.125 bits a weight; ic = 4096 at 2 bits: 0.0156.
    for inputs, bits, more in ((2048, 4, 0.125), (4096, 2, 4 * 16 / 4096)):
        shape = Architecture(1, inputs, 1, 1, inputs, ((512, inputs),), 10)
        counted = dataclasses.replace(LARGE, count_tables=True)
        ratio = decode_s(counted, shape, bits, 0) / decode_s(LARGE, shape, bits, 0)
        assert ratio == pytest.approx((bits + more) / bits)
        assert decode_s(counted, shape, 16, 0) == decode_s(LARGE, shape, 16, 0)
    grouped = decode_s(counted, shape, 2, 0, weights=StoredWeights(group_size=128))
    assert grouped / decode_s(LARGE, shape, 2, 0) == pytest.approx((2 + 4 * 16 / 128) / 2)
    scales = dataclasses.replace(counted, table_entry_bits=1e-9, scale_bits=32)
    grouped = decode_s(scales, shape, 2, 0, weights=StoredWeights(group_size=128))
    assert grouped / decode_s(LARGE, shape, 2, 0) == pytest.approx((2 + 32 / 128) / 2)


def test_a_small_activation_buffer_reads_weights_again_in_prefill() -> None:
    small = dataclasses.replace(LARGE, activation_buffer_bytes=1 << 20, weight_buffer_bytes=1 << 18, num_macs=1e9)
    whole = dataclasses.replace(LARGE, num_macs=1e9)
    assert prefill_forward(small, VICUNA, 4, 1024).linears_s > 3 * prefill_forward(whole, VICUNA, 4, 1024).linears_s
    assert decode_s(small, VICUNA, 4, 100) == decode_s(whole, VICUNA, 4, 100)


def test_a_schedule_sums_its_steps_with_a_growing_context() -> None:
    bits = [4, 4, 3, 3, 3]
    first, steps = generation_s(SMALL, PHI, 100, 4, bits)
    assert first == prefill_forward(SMALL, PHI, 4, 100).total_s
    expected = [float(decode_s(SMALL, PHI, b, 101 + t)) for t, b in enumerate(bits)]
    assert steps == pytest.approx(expected)
    assert tokens_per_s(SMALL, PHI, 100, bits) == pytest.approx(5 / sum(expected))
    # Bound by memory, bytes add up in any order; the context grows whatever the bits.
    late = decode_steps_s(SMALL, PHI, 1000, [4] * 500 + [3] * 500).sum()
    assert late == pytest.approx(decode_steps_s(SMALL, PHI, 1000, [3] * 500 + [4] * 500).sum())
    assert np.all(np.diff(decode_steps_s(SMALL, PHI, 1000, [3] * 50)) > 0)


def test_one_generated_token_has_no_decode_step() -> None:
    assert generation_s(SMALL, PHI, 100, 4, [])[1].shape == (0,)
    with pytest.raises(ValueError, match="decode_bits is empty"):
        tokens_per_s(SMALL, PHI, 100, [])


@pytest.mark.parametrize("seed", range(3))
def test_arrays_of_machines_equal_one_machine_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = {
        "num_macs": rng.integers(1 << 10, 1 << 17, 20).astype(float),
        "bandwidth_bytes_s": rng.uniform(1e9, 1e12, 20),
        "kv_bits": rng.choice([8.0, 16.0], 20),
        "activation_buffer_bytes": rng.uniform(1e5, 1e7, 20),
        "vector_lanes": rng.integers(1, 256, 20).astype(float),
        "matrix_tile_tokens": rng.integers(1, 129, 20).astype(float),
    }
    many = dataclasses.replace(LARGE, count_head=True, **columns)
    bits, context = rng.integers(2, 9, 20), rng.integers(0, 4000, 20)
    decode = decode_s(many, VICUNA, bits, context)
    prefill = prefill_forward(many, VICUNA, bits, context).total_s
    deep = dataclasses.replace(many, **{name: values[:, None] for name, values in columns.items()})
    schedule = decode_steps_s(deep, VICUNA, 50, [4, 4, 3])
    assert decode.shape == prefill.shape == (20,)
    assert schedule.shape == (20, 3)
    for i in range(20):
        one = dataclasses.replace(LARGE, count_head=True, **{name: values[i] for name, values in columns.items()})
        assert decode[i] == decode_s(one, VICUNA, bits[i], context[i])
        assert prefill[i] == prefill_forward(one, VICUNA, bits[i], context[i]).total_s
        assert schedule[i] == pytest.approx(decode_steps_s(one, VICUNA, 50, [4, 4, 3]), rel=1e-14)


def test_a_hundred_thousand_machines_are_one_call() -> None:
    rng = np.random.default_rng(0)
    many = dataclasses.replace(
        LARGE, num_macs=rng.uniform(1e3, 1e5, 100_000), bandwidth_bytes_s=rng.uniform(1e9, 1e12, 100_000)
    )
    gain = decode_s(many, VICUNA, 16, 1000) / decode_s(many, VICUNA, 2, 1000)
    assert gain.shape == (100_000,)
    assert np.all((gain >= 1 - 1e-12) & (gain <= 8))


def test_more_machine_or_fewer_bits_never_take_longer() -> None:
    rng = np.random.default_rng(1)
    many = dataclasses.replace(
        LARGE,
        num_macs=rng.uniform(1e2, 1e5, 1000),
        bandwidth_bytes_s=rng.uniform(1e8, 1e12, 1000),
        vector_lanes=rng.uniform(1, 100, 1000),
        count_head=True,
        count_tables=True,
    )
    base = decode_s(many, VICUNA, 4, 1000)
    for name in ("num_macs", "bandwidth_bytes_s", "vector_lanes", "clock_hz"):
        assert np.all(decode_s(dataclasses.replace(many, **{name: 2 * getattr(many, name)}), VICUNA, 4, 1000) <= base)
    assert np.all(decode_s(many, VICUNA, 3, 1000) <= base)
    assert np.all(decode_s(many, VICUNA, 4, 1001) >= base)


def test_impossible_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bits=0: above 0, at most 16"):
        decode_s(LARGE, VICUNA, 0, 10)
    with pytest.raises(ValueError, match="bits=17"):
        prefill_forward(LARGE, VICUNA, 17, 10)
    with pytest.raises(ValueError, match=r"bits=6: at most parent_bits \(4\), or 16"):
        decode_s(LARGE, VICUNA, 6, 10, weights=StoredWeights(parent_bits=4))
    with pytest.raises(ValueError, match="context_tokens=-1"):
        decode_s(LARGE, VICUNA, 2, -1)
    with pytest.raises(ValueError, match="prompt_tokens=-5"):
        generation_s(LARGE, VICUNA, -5, 4, [2])
    with pytest.raises(ValueError, match="batch=0: at least 1"):
        decode_s(LARGE, VICUNA, 2, 10, batch=0)
    with pytest.raises(ValueError, match=r"num_kv_heads=3: must divide num_heads \(32\)"):
        decode_s(LARGE, dataclasses.replace(VICUNA, num_kv_heads=3), 2, 10)
    with pytest.raises(ValueError, match="activation_buffer_bytes=8000: at least 8192, two rows of 4096 inputs"):
        prefill_forward(dataclasses.replace(LARGE, activation_buffer_bytes=8000), VICUNA, 2, 10)
