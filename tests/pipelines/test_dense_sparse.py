"""Dense and sparse through the pipeline: what it is matched to, and what outliers are charged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import preflight
from pipelines.plan import Cell, Planner
from pipelines.preflight import PreflightError
from pipelines.run import run_cell
from pmpd.artifacts import Store, read_json
from pmpd.config import ConfigError
from pmpd.stages import read_summary
from tests.pipelines.cells import cell, overrides, run


@pytest.mark.parametrize(
    "more",
    [
        ["scheduler=dense_sparse", "scheduler.target.switch_step=4"],
        ["scheduler=dense_sparse_learned"],
    ],
    ids=" ".join,
)
def test_dense_and_sparse_has_the_bits_of_the_scheduler_it_is_matched_to(store, tiny_llama, tmp_path, more):
    lines = overrides(tiny_llama, store, *more)
    frame = run(tiny_llama, store, tmp_path, *more)
    own = frame[frame.scheduler == more[0].partition("=")[2]].set_index("metric")
    planned = Planner(cell(*lines), Store(store)).cell()
    summary = read_summary(Store(store).verify(planned.dense_sparse))["metrics"]
    config = cell(*lines)
    target = Planner(config, Store(store)).cell(config.scheduler.target).evaluation
    run_cell(dataclasses.replace(config, scheduler=config.scheduler.target), tmp_path / "target")
    [average] = [r for r in read_json(Store(store).verify(target) / "results.json") if r["quantity"] == "average_bits"]
    assert summary["target_bits"] == pytest.approx(average["value"])
    read = own.loc["average_bits", "value"]
    assert read == pytest.approx(2 + summary["outlier_bits"])
    assert average["value"] - 0.3 < read <= average["value"]  # matrices this small pay for rows' counts
    assert summary["nominal_outlier_bits"] < summary["outlier_bits"] or read == average["value"] == 2
    completions = (Store(store).verify(planned.evaluation) / "completions.jsonl").read_text()
    assert '"schedule": "2:2"' in completions
    assert own.loc["average_bits_time", "value"] == pytest.approx(read)
    assert 1 < own.loc["npu_decode_speedup", "value"] < 16 / read
    assert set(own.prefill_bits) == {2}
    assert planned.dense_sparse in planned.read  # the note beside the table does


def dense_sparse_cell(model: Path, store: Path, *more: str) -> Cell:
    return Planner(cell(*overrides(model, store, *more)), Store(store)).cell()


def test_scoring_otherwise_makes_no_other_dense_and_sparse_model(store, tiny_llama):
    def planned(*more: str):
        return dense_sparse_cell(tiny_llama, store, "scheduler=dense_sparse_learned", *more)

    one, other = planned(), planned("budget.bootstrap_resamples=99")
    assert one.evaluation.key != other.evaluation.key
    assert one.dense_sparse.key == other.dense_sparse.key


@pytest.mark.parametrize(
    ("scheduler", "target", "setting"),
    [
        ("dense_sparse_learned", "learned", "epochs=3"),
        ("dense_sparse_learned", "learned", "learning_rate=0.01"),
        ("dense_sparse_learned", "learned", "weight_decay=0.2"),
        ("dense_sparse_learned", "learned", "dropout=0.3"),
        ("dense_sparse_learned", "learned", "train_batch=5"),
        ("dense_sparse", "static", "prefill=fp16"),
        ("dense_sparse", "static", "prefill_bits=3"),
    ],
)
def test_what_is_set_for_the_matched_scheduler_reaches_it(store, tiny_llama, scheduler, target, setting):
    def planned(name: str, *more: str):
        return dense_sparse_cell(tiny_llama, store, f"scheduler={name}", *more)

    own = planned(scheduler, f"scheduler.{setting}")
    beside = planned(target, f"scheduler.{setting}")
    wanted = "decide" if target == "learned" else "fit_static"
    [found] = [n.key for n in own.dense_sparse.ancestors() if n.stage == wanted]
    assert found in {n.key for n in beside.evaluation.ancestors()}
    assert own.dense_sparse.key != planned(scheduler).dense_sparse.key


def test_outliers_beyond_the_nested_models_bits_are_estimated(store, tiny_llama, tmp_path):
    more = ["scheduler=dense_sparse_nominal", "scheduler.target.switch_step=9", "quantizer.parent_bits=4"]
    own = run(tiny_llama, store, tmp_path, *more).query("scheduler == 'dense_sparse_nominal'").set_index("metric")
    read = own.loc["average_bits", "value"]
    assert read > 4
    assert 1 < own.loc["npu_decode_speedup", "value"] < 16 / read


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("quantizer=joint", r"quantizer=joint is not possible: anyprec with scheduler=dense_sparse"),
        ("quantizer.refits=2", r"quantizer\.refits=2 is not possible: 0 with scheduler=dense_sparse"),
        ("quantizer.tuning_steps=2", r"quantizer\.tuning_steps=2 is not possible: 0 with"),
        ("quantizer.sensitivity_power=0.75", r"quantizer\.sensitivity_power=0\.75 is not possible: 1\.0 with"),
    ],
)
def test_options_that_the_dense_part_would_not_follow_are_refused_for_its_cell_alone(store, tiny_llama, setting, words):
    with pytest.raises(ConfigError, match=words):
        dense_sparse_cell(tiny_llama, store, "scheduler=dense_sparse", "scheduler.target.switch_step=4", setting)
    dense_sparse_cell(tiny_llama, store, "scheduler=high", setting)


def test_the_disk_check_counts_a_dense_and_sparse_model(store, tiny_llama, monkeypatch):
    monkeypatch.setattr(preflight, "BYTES_PER_WEIGHT", {".safetensors": 1e-5})  # a model of billions
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))

    def check(*more: str) -> None:
        preflight.check_disk(Planner(cell(*overrides(tiny_llama, store, *more)), Store(store)))

    check("scheduler=learned")  # what it needs is in the store
    with pytest.raises(PreflightError, match="the plan writes about"):
        check("scheduler=dense_sparse", "scheduler.target.switch_step=2")


def test_a_joint_quantisers_outliers_are_charged(store, tiny_llama, tmp_path):
    more = ["scheduler=high", "quantizer=joint", "quantizer.outlier_share=0.01", "quantizer.group_size=32"]
    more += ["model.high_bits=4", "quantizer.parent_bits=4"]
    frame = run(tiny_llama, store, tmp_path, *more)
    own = frame[frame.scheduler == "high"].set_index("metric")
    # 32 bits for each of one weight in a hundred, and 16 bits a row of 64 or more columns.
    assert 4.32 <= own.loc["average_bits", "value"] <= 4.32 + 16 / 64 + 0.02
    assert own.loc["average_bits_time", "value"] == pytest.approx(own.loc["average_bits", "value"])
    fp16 = frame[frame.scheduler == "fp16"].set_index("metric")
    assert fp16.loc["average_bits", "value"] == 16
    assert fp16.loc["npu_decode_speedup", "value"] == pytest.approx(1)
