"""Against the printed values of the paper's NPU figure and against sums done by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pmpd.hardware.npu import NPU, decode_step_s, generation_time_s, prefill_s, tokens_per_s
from pmpd.records import Architecture


def decoder(layers: int, hidden: int, mlp: int, mlp_matrices: int, heads: int, vocab: int) -> Architecture:
    up = [(mlp, hidden)] * (mlp_matrices - 1)
    shapes = ((hidden, hidden),) * 4 + (*up, (hidden, mlp))
    return Architecture(layers, hidden, heads, heads, hidden // heads, shapes, vocab)


VICUNA = decoder(32, 4096, 11008, 3, 32, 32000)
MOBILE_LLAMA = decoder(24, 2048, 5632, 3, 16, 32000)
PHI = decoder(24, 2048, 8192, 2, 32, 51200)
LARGE = NPU("16K", num_macs=16384, clock_hz=1e9, bandwidth_bytes_s=32e9)
SMALL = NPU("4K", num_macs=4096, clock_hz=1e9, bandwidth_bytes_s=32e9)
TINY = Architecture(2, 8, 4, 2, 2, ((8, 8), (4, 8)), 10)
UNIT = NPU("unit", num_macs=10, clock_hz=1.0, bandwidth_bytes_s=100.0)


def rate(npu: NPU, architecture: Architecture, bits: float, context: float) -> float:
    return float(1.0 / decode_step_s(npu, architecture, bits, context))


@pytest.mark.parametrize(
    ("npu", "architecture", "linear_weights", "ceilings"),
    [
        (LARGE, VICUNA, 6.476e9, {16: "2.471", 4: "9.883", 3: "13.18", 2: "19.77"}),
        (SMALL, MOBILE_LLAMA, 1.2331e9, {16: "12.98", 4: "51.90", 3: "69.20", 2: "103.8"}),
        (SMALL, PHI, 1.2080e9, {16: "13.25", 4: "52.98", 3: "70.64", 2: "106.0"}),
    ],
)
def test_ceilings_without_context(
    npu: NPU, architecture: Architecture, linear_weights: float, ceilings: dict[int, str]
) -> None:
    assert architecture.num_layers * architecture.block_parameters == pytest.approx(linear_weights, rel=1e-4)
    assert {bits: f"{rate(npu, architecture, bits, 0):#.4g}" for bits in ceilings} == ceilings


@pytest.mark.parametrize(
    ("npu", "architecture", "context", "bits", "printed"),
    [
        (LARGE, VICUNA, 1100, 16, 2.42),  # the bar reads 2.31, its printed ratios 2.41 to 2.43
        (LARGE, VICUNA, 1100, 3, 11.81),
        (SMALL, MOBILE_LLAMA, 1100, 16, 12.5),
        (SMALL, MOBILE_LLAMA, 1100, 4, 43.98),
        (SMALL, PHI, 1100, 16, 12.73),
        (SMALL, PHI, 1100, 4, 44.91),
        (LARGE, VICUNA, 100, 16, 2.49),  # from the printed ratios
        (LARGE, VICUNA, 100, 3, 12.96),
        (SMALL, MOBILE_LLAMA, 100, 16, 13.25),
        (SMALL, MOBILE_LLAMA, 100, 4, 51.28),
        (SMALL, PHI, 100, 16, 13.25),
        (SMALL, PHI, 100, 4, 52.14),
        (LARGE, VICUNA, 30, 16, 2.52),
        (LARGE, VICUNA, 30, 3, 13.11),
        (SMALL, MOBILE_LLAMA, 30, 16, 13.11),
        (SMALL, MOBILE_LLAMA, 30, 4, 51.93),
    ],
)
def test_bars_with_one_context_a_task(
    npu: NPU, architecture: Architecture, context: int, bits: int, printed: float
) -> None:
    assert rate(npu, architecture, bits, context) == pytest.approx(printed, rel=0.04)


def test_the_output_head_costs_an_eighth_of_the_speed_up() -> None:
    bare, counted = (dataclasses.replace(LARGE, count_head=head) for head in (False, True))
    assert rate(bare, VICUNA, 2, 0) / rate(bare, VICUNA, 16, 0) == pytest.approx(8.0)
    assert rate(counted, VICUNA, 2, 0) / rate(counted, VICUNA, 16, 0) == pytest.approx(7.02, abs=0.01)
    phi = dataclasses.replace(SMALL, count_head=True)
    assert rate(phi, PHI, 3, 0) / rate(phi, PHI, 16, 0) == pytest.approx(3.96, abs=0.01)
    assert rate(phi, MOBILE_LLAMA, 3, 0) / rate(phi, MOBILE_LLAMA, 16, 0) == pytest.approx(4.38, abs=0.01)


def test_decode_step_by_hand() -> None:
    # 2 blocks of 96 weights at 4 bits: 96 bytes. Cache: 2 (K, V) * 2 layers * 4 wide * 3 tokens: 48 bytes.
    assert decode_step_s(UNIT, TINY, 4, 3) == pytest.approx(19.2 + 2 * 2 * 8 * 3 / 10)  # 192 + 96 MACs at 10 a second
    fast = dataclasses.replace(UNIT, num_macs=10_000)
    assert decode_step_s(fast, TINY, 4, 3) == pytest.approx((96 + 48) / 100)
    assert decode_step_s(dataclasses.replace(fast, kv_bits=16), TINY, 4, 3) == pytest.approx((96 + 96) / 100)
    assert decode_step_s(dataclasses.replace(fast, bandwidth_efficiency=0.5), TINY, 4, 3) == pytest.approx(2.88)
    assert decode_step_s(dataclasses.replace(UNIT, mac_utilisation_decode=0.5), TINY, 4, 3) == pytest.approx(57.6)
    head = dataclasses.replace(fast, count_head=True, head_bits=8)
    assert decode_step_s(head, TINY, 4, 3) == pytest.approx((96 + 48 + 80) / 100)
    assert decode_step_s(dataclasses.replace(UNIT, count_head=True), TINY, 4, 3) == pytest.approx((288 + 80) / 10)


def test_prefill_by_hand() -> None:
    # 3 tokens: 3 * 192 MACs of weights, 2 layers * 8 wide * 3 * 4 of causal attention.
    assert prefill_s(UNIT, TINY, 4, 3) == pytest.approx((576 + 192) / 10)
    assert prefill_s(dataclasses.replace(UNIT, mac_utilisation_prefill=0.5), TINY, 4, 3) == pytest.approx(153.6)
    assert prefill_s(dataclasses.replace(UNIT, count_head=True), TINY, 4, 3) == pytest.approx((768 + 80) / 10)
    fast = dataclasses.replace(UNIT, num_macs=10_000)
    assert prefill_s(fast, TINY, 4, 3) == pytest.approx((96 + 48) / 100)


def test_prefill_at_high_precision_is_nearly_free() -> None:
    npu = dataclasses.replace(LARGE, mac_utilisation_prefill=0.8)
    high, low = (float(prefill_s(npu, VICUNA, bits, 1024)) for bits in (16, 2))
    assert high == low == pytest.approx(0.51, abs=0.02)  # compute-bound at any precision


def test_one_token_of_prefill_is_one_decode_step() -> None:
    for npu in (UNIT, dataclasses.replace(UNIT, num_macs=10_000, count_head=True)):
        assert prefill_s(npu, TINY, 4, 1) == pytest.approx(float(decode_step_s(npu, TINY, 4, 1)))


def test_a_layout_that_is_not_nested_saves_nothing_at_low_bits() -> None:
    flat = dataclasses.replace(LARGE, nested_layout=False)
    times = decode_step_s(flat, VICUNA, np.array([2, 3, 8]), 0, parent_bits=8)
    assert np.ptp(times) == 0.0
    assert times[0] == decode_step_s(LARGE, VICUNA, 8, 0)
    assert decode_step_s(flat, VICUNA, 16, 0, parent_bits=8) == decode_step_s(LARGE, VICUNA, 16, 0)
    with pytest.raises(ValueError, match="parent_bits=None"):
        decode_step_s(flat, VICUNA, 2, 0)


def test_arrays_equal_one_at_a_time() -> None:
    bits, context = np.array([[2], [3], [16]]), np.array([10, 2000])
    times = decode_step_s(LARGE, VICUNA, bits, context)
    assert times.shape == (3, 2)
    for i, b in enumerate((2, 3, 16)):
        for j, c in enumerate((10, 2000)):
            assert times[i, j] == decode_step_s(LARGE, VICUNA, b, c)


def test_generation_sums_its_steps_with_a_growing_context() -> None:
    bits = [4, 4, 3, 3, 3]
    prefill, decode = generation_time_s(SMALL, PHI, 100, 4, bits)
    assert prefill == prefill_s(SMALL, PHI, 4, 100)
    assert decode == pytest.approx(sum(float(decode_step_s(SMALL, PHI, b, 101 + t)) for t, b in enumerate(bits)))
    assert tokens_per_s(SMALL, PHI, 100, bits) == pytest.approx(5 / decode)
    late = generation_time_s(SMALL, PHI, 1000, 4, [4] * 500 + [3] * 500)[1]
    assert late == pytest.approx(generation_time_s(SMALL, PHI, 1000, 4, [3] * 500 + [4] * 500)[1])  # memory-bound sums


def test_one_generated_token_has_no_decode_step() -> None:
    assert generation_time_s(SMALL, PHI, 100, 4, [])[1] == 0.0
    with pytest.raises(ValueError, match="decode_bits is empty"):
        tokens_per_s(SMALL, PHI, 100, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_macs", 0), ("clock_hz", -1.0), ("bandwidth_bytes_s", 0.0), ("kv_bits", 0), ("head_bits", 0)]
    + [(name, share) for name in ("bandwidth_efficiency", "mac_utilisation_prefill") for share in (0.0, 1.5)]
    + [("mac_utilisation_decode", float("nan"))],
)
def test_an_impossible_npu_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        dataclasses.replace(LARGE, **{field: value})


def test_impossible_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bits=0: above 0, at most 16"):
        decode_step_s(LARGE, VICUNA, 0, 10)
    with pytest.raises(ValueError, match="bits=17"):
        prefill_s(LARGE, VICUNA, 17, 10)
    with pytest.raises(ValueError, match=r"bits=6: at most parent_bits \(4\), or 16"):
        decode_step_s(LARGE, VICUNA, 6, 10, parent_bits=4)
    with pytest.raises(ValueError, match="context_tokens=-1"):
        decode_step_s(LARGE, VICUNA, 2, -1)
    with pytest.raises(ValueError, match="prompt_tokens=-5"):
        generation_time_s(LARGE, VICUNA, -5, 4, [2])
