"""Tables, frame and figures from records made by hand."""

import dataclasses
import math

import pandas as pd
import pytest

from pmpd.report import (
    COLUMNS,
    CellRecord,
    category_table,
    draw_cells,
    draw_perplexity,
    draw_quality,
    draw_switch_steps,
    failures_line,
    markdown_table,
    perplexity_table,
    summary_table,
    tidy,
)


def row(quantity, value, unit="u"):
    return {
        "quantity": quantity,
        "unit": unit,
        "value": value,
        "ci_low": value - 1,
        "ci_high": value + 1,
        "n": 8,
        "key": "k" * 16,
    }


def record(scheduler="static", bits=3.5, value=20.0):
    return CellRecord(
        "m",
        "cnndm",
        scheduler,
        4,
        (4, 3),
        ("rouge_l",),
        [row("rouge_l", value), row("rouge_l minus high", -0.5), row("agreement", 30.0), row("average_bits", bits)],
        switch_curve=[{"switch_steps": [s], **row("rouge_l", 20.0 + s)} for s in (0, 20, 40)],
        perplexity_curve=[
            {"bits": b, "perplexity": p, "relative": p / 30 - 1, "n": 64, "key": "s" * 16}
            | {"relative_low": p / 30 - 1.01, "relative_high": p / 30 - 0.99, "detectable_rise": 0.015}
            for b, p in ((2, 90.0), (3, 40.0), (4, 31.0), (16, 30.0))
        ],
    )


def test_tidy_has_the_promised_columns_and_a_row_a_number(tmp_path):
    frame = tidy([record(), record("high", 4.0)])
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 2 * 4 + (1 + 3 * 3)  # a cell's results each, the model's perplexities once
    frame.to_csv(tmp_path / "r.csv", index=False)
    again = pd.read_csv(tmp_path / "r.csv")
    static = again[(again.scheduler == "static") & (again.metric == "rouge_l")].iloc[0]
    assert (static.high_bits, static.low_bits, static.average_bits, static.value, static.n) == (4, 3, 3.5, 20.0, 8)


def test_every_number_of_the_perplexity_table_has_a_row_and_a_key():
    frame = tidy([record(), record("high", 4.0)]).set_index("metric")
    own = frame[frame.key == "s" * 16]
    assert own.index.is_unique
    row = own.loc["perplexity_4_bits over fp16"]
    assert (row.model, row.high_bits, row.n) == ("m", 4, 64)
    assert [f"{100 * v:+.2f}" for v in (row.value, row.ci_low, row.ci_high)] == ["+3.33", "+2.33", "+4.33"]
    assert own.loc["perplexity_4_bits", "value"] == 31
    assert own.loc["perplexity_4_bits detectable rise", "value"] == 0.015
    assert own.loc["perplexity_16_bits", "value"] == 30
    assert "perplexity_16_bits over fp16" not in own.index
    assert own[["task", "scheduler"]].isna().all(axis=None)


def test_the_search_says_beside_each_precision_what_its_windows_could_have_shown():
    broken = {"bits": 1, "perplexity": math.inf, "relative": math.inf, "n": 64}
    broken |= dict.fromkeys(("relative_low", "relative_high", "detectable_rise"), math.nan)
    lines = perplexity_table([*record().perplexity_curve, broken], 0.05).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["bits", "perplexity", "over fp16 [95 %]", "detectable rise", "within 5%", "windows"]
    assert cells[2] == ["16", "30.00", "-", "-", "-", "64"]
    assert cells[3] == ["4", "31.00", "+3.33 % [+2.33, +4.33]", "1.50 %", "yes", "64"]
    assert cells[4] == ["3", "40.00", "+33.33 % [+32.33, +34.33]", "1.50 %", "no", "64"]
    assert "within 0.5%" in perplexity_table(record().perplexity_curve, 0.005)
    assert cells[6] == ["1", "inf", "+inf % [+nan, +nan]", "nan %", "no", "64"]


def test_markdown_is_aligned():
    lines = markdown_table(["a", "long header"], [["1", "x"], ["22", "yy"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_summary_shows_value_interval_and_difference():
    table = summary_table([record()])
    assert "20.0 [19.0, 21.0]" in table
    assert "-0.5 [-1.5, +0.5]" in table
    assert "3.50" in table


def test_a_quantity_that_was_not_measured_is_a_dash_not_a_zero():
    estimated = dataclasses.replace(record("high"), results=[*record("high").results, row("npu_decode_speedup", 3.0)])
    assert "NPU" not in summary_table([record()])
    header, _, high, static = summary_table([estimated, record()]).splitlines()
    assert "NPU speed-up" in header
    assert "3.00x" in high
    assert static.count(" - ") == 1


def test_average_bits_by_token_and_time_stand_beside_those_by_sequence():
    one = dataclasses.replace(record(), results=[*record().results, row("average_bits_time", 3.25)])
    header, _, line = summary_table([one]).splitlines()
    assert "by time" in header
    assert "by token" not in header
    assert "3.25" in line


def test_categories_have_a_row_each_with_their_own_n():
    results = [
        *record().results,
        row("rouge_l of math", 5.0) | {"n": 3},
        row("rouge_l of math minus high", -1.0) | {"n": 3},
        row("rouge_l of writing", 7.0) | {"n": 5},
    ]
    lines = category_table([dataclasses.replace(record(), results=results)]).splitlines()
    assert [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["math", "3", "static", "5.0 [4.0, 6.0]", "-1.0 [-2.0, +0.0]"],
        ["writing", "5", "static", "7.0 [6.0, 8.0]", "-"],
    ]
    assert category_table([record()]) == ""


def test_failures_are_counted_where_there_are_any():
    assert failures_line([record()]) == "Counted: no cut prompt, no cut or empty answer."
    failed = dataclasses.replace(record(), results=[row("unended_answers", 2), row("empty_answers", 0)])
    assert failures_line([failed]) == "Counted: static: 2 of 8 answers cut off by max_new_tokens."


@pytest.mark.parametrize("name", ["quality", "perplexity", "switch", "cells"])
def test_figures_are_written_as_png_and_pdf(tmp_path, name):
    path = tmp_path / f"{name}.png"
    if name == "quality":
        draw_quality([record(), record("fp16", 16.0), record("low", 3.0, 6.0)], path)
    elif name == "cells":
        draw_cells([record(f"s{k}", 3.0 + k / 20) for k in range(12)], path)
    elif name == "perplexity":
        draw_perplexity(record().perplexity_curve, 0.05, "m", path)
    else:
        draw_switch_steps(record(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
