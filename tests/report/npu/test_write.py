"""The report's files, for the shipped machines and for one that nobody published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd

from pmpd.hardware.npu import NPU
from pmpd.report.npu import COLUMNS, write_npu_report

FIGURES = {"bars", "head", "kv_cache", "layout", "context", "batch", "prefill", "machines"}


def test_results_tables_and_a_figure_for_each_question(npus: list[NPU], tmp_path: Path) -> None:
    text = write_npu_report(npus, tmp_path)
    frame = pd.read_csv(tmp_path / "results.csv")
    assert tuple(frame.columns) == COLUMNS
    assert not frame.drop(columns="published").isna().any().any()
    assert {p.stem for p in tmp_path.glob("*.png")} == {p.stem for p in tmp_path.glob("*.pdf")} == FIGURES
    assert text == (tmp_path / "table.md").read_text()
    assert "19.77" in text
    assert "circular" in text


def test_a_machine_of_ones_own_is_reported_without_published_rows(npus: list[NPU], tmp_path: Path) -> None:
    own = dataclasses.replace(npus[0], name="mine", bandwidth_bytes_s=64e9)
    write_npu_report([own], tmp_path)
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(frame.hardware) == {"mine"}
    assert frame.published.isna().all()
    row = frame[(frame.model == "vicuna7b") & (frame.weight_bits == 2) & (frame["head"] == "excluded")]
    assert row.set_index("quantity").value["decode_throughput"] > 1.99 * 19.76
    assert not (tmp_path / "bars.png").exists()
