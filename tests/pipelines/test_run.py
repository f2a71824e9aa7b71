"""The whole pipeline on a tiny random model: every scheduler, and reported from its store.

What it decodes is noise; what is tested is that each part hands the next what it needs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import initialize_config_dir

from pipelines.grid import CONF, grid_of
from pipelines.report import report
from pipelines.run import run_cell
from pipelines.schema import register
from pipelines.store import main as look
from pmpd.config import ConfigError
from pmpd.report import COLUMNS
from tests.pipelines.cells import cell, overrides

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("scheduler", ["fp16", "high", "low", "static", "learned"])
def test_every_scheduler_ends_in_a_table_and_figures(store, scheduler):
    out = store.parent / scheduler
    frame = pd.read_csv(out / "results.csv")
    assert tuple(frame.columns) == COLUMNS
    assert scheduler in set(frame.scheduler)
    own = frame[frame.scheduler == scheduler].set_index("metric")
    assert {"rouge_l", "rouge_l minus high", "agreement", "average_bits", "npu_decode_speedup"} <= set(own.index)
    assert own.loc["rouge_l", "n"] == 4
    assert (own.key.str.len() == 16).all()
    for figure in ("quality_llama-0_cnndm", "perplexity_llama-0"):
        assert (out / f"{figure}.png").exists()
        assert (out / f"{figure}.pdf").exists()
    assert scheduler in (out / "table.md").read_text()


def test_uniform_schedulers_have_their_bits_and_fp16_agrees_with_itself(store):
    for scheduler, bits, prefill in (("fp16", 16, 16), ("high", 4, 4), ("low", 2, 2)):
        frame = pd.read_csv(store.parent / scheduler / "results.csv")
        own = frame[frame.scheduler == scheduler].set_index("metric")
        assert own.loc["average_bits", "value"] == bits
        assert set(own.prefill_bits) == {prefill}
        if scheduler == "fp16":
            assert own.loc["agreement", "value"] == pytest.approx(100)
            assert own.loc["npu_decode_speedup", "value"] == pytest.approx(1)


@pytest.mark.parametrize(
    "more",
    [
        ["task=dialogsum", "scheduler=static"],
        ["task=own", "scheduler=static"],
        ["task=iwslt", "scheduler=static", "task.metrics=[bleu,sacrebleu]"],
        ["scheduler=static", "scheduler.prefill_bits=16"],
        ["scheduler=static", "scheduler.switch_step=2"],
        ["scheduler=static", "model.middle_bits=[3]"],
        ["scheduler=learned", "model.middle_bits=[3]"],
        ["scheduler=static", "model.middle_bits=[3]", "scheduler.switch_steps=[2,5]"],
        ["scheduler=static", "scheduler.grid_parts=6"],
        ["scheduler=learned", "scheduler.grid_parts=4", "scheduler.prefill_bits=16"],
        ["scheduler=learned_activations"],
        ["scheduler=learned_statistics"],
        ["scheduler=learned_both"],
        ["scheduler=random"],
        ["scheduler=random_prior", "model.middle_bits=[3]"],
        ["scheduler=confidence", "scheduler.options.first_tokens=3"],
        ["scheduler=oracle"],
        ["scheduler=oracle_lossless", "task=iwslt", "task.metrics=[bleu,sacrebleu]"],
        ["scheduler=uniform", "scheduler.bits=3"],
        ["scheduler=first_half"],
        ["scheduler=middle_third"],
        ["scheduler=low_after_fp16"],
        ["scheduler=high_after_low"],
        ["scheduler=high", "quantizer.group_size=32"],
        ["scheduler=static", "quantizer=joint"],
        ["scheduler=high", "quantizer=joint", "quantizer.outlier_share=0.01", "quantizer.group_size=32"],
        ["scheduler=static", "quantizer.tuning_steps=2"],
        ["scheduler=high", "quantizer.refits=2", "quantizer.tuning_steps=2"],
    ],
    ids=" ".join,
)
def test_other_tasks_and_settings_run_whole(store, tiny_llama, tmp_path, more):
    chosen = {m.partition("=")[0] for m in more}
    lines = [o for o in overrides(tiny_llama, store) if o.partition("=")[0] not in chosen]
    run_cell(cell(*lines, *more), tmp_path)
    frame = pd.read_csv(tmp_path / "results.csv")
    scheduler = next(m.partition("=")[2] for m in more if m.startswith("scheduler="))
    own = frame[frame.scheduler == scheduler].set_index("metric")
    if "quantizer.outlier_share=0.01" in more:  # 0.01 x (16 + 16 bits and more) on top of the codes' 4; rows are short
        assert 4.3 < own.loc["average_bits", "value"] < 5
    else:
        assert 2 <= own.loc["average_bits", "value"] <= 4
    if "scheduler.switch_step=2" in more:
        assert own.loc["average_bits", "value"] == pytest.approx((2 * 4 + 6 * 2) / 8)
    if "scheduler.switch_steps=[2,5]" in more:
        assert own.loc["average_bits", "value"] == pytest.approx((2 * 4 + 3 * 3 + 3 * 2) / 8)
    if scheduler in ("first_half", "middle_third"):
        assert own.loc["average_bits", "value"] == pytest.approx(
            {"first_half": 3, "middle_third": 2 + 2 * 3 / 8}[scheduler]
        )
    if scheduler == "uniform":
        assert own.loc["average_bits", "value"] == 3
    given = 16 if "scheduler.prefill_bits=16" in more else 4
    assert set(own.prefill_bits) == {{"low_after_fp16": 16, "high_after_low": 2, "uniform": 3}.get(scheduler, given)}


def test_every_number_of_a_report_leads_back_to_weights_and_data(store, capsys):
    for scheduler in ("static", "learned"):
        table = store.parent / scheduler / "results.csv"
        frame = pd.read_csv(table)
        assert frame.key.notna().all()
        for line in frame.drop_duplicates("key").index:
            assert look(["why", f"{table}:{line + 2}", "--store", str(store)]) == 0
            said = capsys.readouterr().out
            assert "model: source " in said
            assert "not in this store" not in said
        assert {p.parent.name for key in set(frame.key) for p in store.glob(f"*/{key}")} == {
            "search",
            "evaluate",
            "estimate",
            "latency",
        }


def test_the_report_reads_the_store_alone_and_names_what_is_missing(store, tiny_llama, tmp_path, caplog):
    lines = overrides(tiny_llama, store, "scheduler=high,static")
    assert report(lines, tmp_path / "paper") == []
    frame = pd.read_csv(tmp_path / "paper" / "results.csv")
    assert set(frame.scheduler.dropna()) == {"high", "static"}  # perplexities belong to none
    assert "static" in (tmp_path / "paper" / "table.md").read_text()
    missing = report([*overrides(tiny_llama, store, "scheduler=high,static"), "seed=7"], tmp_path / "paper")
    assert len(missing) == 2
    assert "seed=7" in missing[0].command
    assert "scheduler=high" in missing[0].command
    assert "python pipelines/run.py" in caplog.text
    assert pd.read_csv(tmp_path / "paper" / "results.csv").empty, "the numbers of another grid are not left beside it"
    assert "seed=7" in (tmp_path / "paper" / "table.md").read_text()
    assert not list((tmp_path / "paper").glob("*.p[nd][gf]"))


def test_the_npu_report_needs_no_store_and_no_cell_can_be_run_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(["experiment=npu"], tmp_path / "npu") == []
    frame = pd.read_csv(tmp_path / "npu" / "results.csv")
    assert set(frame.hardware) == {"npu_16k", "npu_4k", "flightllm_vhk158"}
    assert [p.name for p in tmp_path.iterdir()] == ["npu"]
    with pytest.raises(ConfigError, match=r"report=npu: no cell to run; .*pipelines/report\.py"):
        run_cell(cell("experiment=npu"), tmp_path)
    with pytest.raises(ConfigError, match=r"hardware\.bandwidth_bytes_s=0\.0"):
        report(["experiment=npu", "hardware.bandwidth_bytes_s=0"], tmp_path / "none")


def test_a_grid_is_an_experiments_sweep_with_the_command_lines(tiny_llama):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert [c[-1] for c in grid_of(["experiment=quickstart"])] == [
            f"scheduler={s}" for s in ("fp16", "high", "low", "static", "learned")
        ]
        assert len(grid_of(["task=dialogsum,iwslt", "scheduler=high,low"])) == 4
        assert [c[-1] for c in grid_of(["experiment=quickstart", "scheduler=low"])] == ["scheduler=low"]


def test_planning_and_reporting_import_no_model_code():
    asked = (
        "import sys, pipelines.run; print('transformers.modeling_utils' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
