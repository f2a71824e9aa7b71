"""The shipped machines against everything published, at stated tolerances."""

from __future__ import annotations

import pandas as pd
import pytest

from pmpd.hardware.npu import NPU, published_shapes
from pmpd.report.npu import COLUMNS, ceilings, compare, read_published

CEILINGS = {
    "vicuna7b": ("2.471", "9.883", "13.18", "19.77"),
    "mobilellama": ("12.98", "51.90", "69.20", "103.8"),
    "phi1_5": ("13.25", "52.98", "70.64", "106.0"),
}


@pytest.fixture(scope="module")
def compared(npus: list[NPU]) -> pd.DataFrame:
    frame = compare(npus)
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == len(read_published())
    return frame.assign(
        off=frame.value / frame.published - 1,
        paper=frame.hardware != "flightllm_vhk158",
        circular=frame.confidence.str.contains("circular"),
    )


def test_every_published_case_has_a_shape_a_place_and_a_confidence() -> None:
    for row in read_published():
        assert row.model in published_shapes()
        assert row.place
        assert row.confidence.partition(",")[0] in ("H", "M", "L")


@pytest.mark.parametrize("model", CEILINGS)
def test_ceilings_to_four_digits(npus: list[NPU], model: str) -> None:
    frame = ceilings(npus)
    rows = frame[(frame.model == model) & (frame["head"] == "excluded") & (frame.quantity == "decode_throughput")]
    assert (rows.context_tokens == 0).all()
    found = rows.set_index("weight_bits").value
    assert tuple(f"{found[bits]:#.4g}" for bits in (16, 4, 3, 2)) == CEILINGS[model]


@pytest.mark.parametrize(
    ("model", "bits", "gain"), [("vicuna7b", 2, 7.02), ("phi1_5", 3, 3.96), ("mobilellama", 3, 4.38)]
)
def test_the_counted_head_takes_its_share_of_the_gain(npus: list[NPU], model: str, bits: int, gain: float) -> None:
    frame = ceilings(npus)
    row = frame[(frame.model == model) & (frame.weight_bits == bits) & (frame.quantity == "decode_speedup")]
    row = row.set_index("head").value
    assert row["excluded"] == pytest.approx(16 / bits)
    assert row["counted"] == pytest.approx(gain, abs=0.01)


def test_uniform_bars_with_one_context_a_task(compared: pd.DataFrame) -> None:
    rows = compared[compared.paper & (compared.quantity == "decode_throughput") & (compared.schedule == "high")]
    assert len(rows) == 8
    assert rows.groupby("task").context_tokens.nunique().eq(1).all()
    assert rows.off.abs().max() < 0.04


def test_static_and_learned_bars_whose_bits_do_not_come_from_them(compared: pd.DataFrame) -> None:
    rows = compared[(compared.quantity == "decode_throughput") & compared.schedule.isin(["static", "learned"])]
    assert (len(rows), rows.circular.sum()) == (16, 6)
    assert rows[~rows.circular].off.abs().max() < 0.04


def test_bits_solved_from_a_bar_are_marked_circular() -> None:
    for row in read_published():
        assert row.circular == row.bits_source.startswith(("solved from this bar", "the label 8.0"))


def test_the_fp16_column_follows_from_uniform_bar_over_label(compared: pd.DataFrame) -> None:
    rows = compared[compared.quantity == "decode_throughput_by_label"]
    assert len(rows) == 8
    assert rows.off.abs().max() < 0.02


def test_fp16_bars_but_for_two_pixel_readings_of_vicuna(compared: pd.DataFrame) -> None:
    # Bars of 2.3 tokens/s on an axis to 80: 0.1 is one pixel. Their labels, above, put them at 2.41 and 2.49.
    rows = compared[compared.paper & (compared.quantity == "decode_throughput") & (compared.schedule == "fp16")]
    off = rows.set_index(["model", "task"]).off.abs()
    misread = off[off > 0.04]
    assert set(misread.index) == {("vicuna7b", "cnndm"), ("vicuna7b", "dialogsum")}
    assert misread.max() < 0.08


def test_printed_gains(compared: pd.DataFrame) -> None:
    rows = compared[compared.paper & (compared.quantity == "decode_speedup")]
    assert len(rows) == 24
    assert rows[~rows.circular].off.abs().max() < 0.04


def test_flightllms_published_times(compared: pd.DataFrame) -> None:
    rows = compared[~compared.paper]
    assert set(rows.quantity) == {"decode_latency", "prefill_latency", "decode_throughput"}
    assert rows.off.abs().max() < 0.15
    assert rows[rows.quantity == "prefill_latency"].off.abs().max() < 0.02


def test_prefill_overhead_is_nil_where_the_paper_has_up_to_a_percent(compared: pd.DataFrame) -> None:
    rows = compared[compared.quantity == "prefill_overhead"]
    assert len(rows) == 2
    assert rows.value.tolist() == pytest.approx([0, 0], abs=1e-9)
