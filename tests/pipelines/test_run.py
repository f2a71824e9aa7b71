"""The whole pipeline on a tiny random model: every scheduler, from the store again, resumed, and reported.

What it decodes is noise; what is tested is that each part hands the next what it needs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode

from pipelines import run as run_module
from pipelines.grid import CONF, grid_of
from pipelines.plan import MissingSearchError, Planner
from pipelines.preflight import PreflightError
from pipelines.report import report
from pipelines.run import run_cell
from pipelines.schema import register
from pipelines.store import main as look
from pmpd.artifacts import Store
from pmpd.config import ConfigError
from pmpd.kernels import CudaUnavailableError
from pmpd.report import COLUMNS
from pmpd.stages import execute
from tests.pipelines.cells import cell, overrides, run

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


def test_a_second_run_builds_nothing(store, tiny_llama, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tiny_llama, store, tmp_path / "again", "scheduler=learned")
    assert "done in" not in caplog.text
    assert "cached" in caplog.text
    again = (tmp_path / "again" / "results.csv").read_text()
    assert again == (store.parent / "learned" / "results.csv").read_text()


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


def test_explicit_precisions_and_those_of_the_search_share_artifacts(store, tiny_llama):
    def planned(*more: str) -> Planner:
        lines = [o for o in overrides(tiny_llama, store, "scheduler=high") if "_bits" not in o]
        return Planner(cell(*lines, *more), Store(store))

    found = planned().precisions()
    assert found.source == "search"
    given = planned(f"model.high_bits={found.high}", f"model.low_bits={found.low}")
    assert given.precisions().source == "given"
    assert planned().cell().evaluation.key == given.cell().evaluation.key


def test_precisions_that_hang_on_a_search_that_has_not_run_are_said_so(tiny_llama, tmp_path):
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=high") if "_bits" not in o]
    with pytest.raises(MissingSearchError, match="search has not run"):
        Planner(cell(*lines), Store(tmp_path / "store")).cell()


def test_a_damaged_search_is_built_again(store, tiny_llama, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=high") if "_bits" not in o]
    copy = Store(tmp_path / "store")
    planner = Planner(cell(*lines), copy)
    expected = planner.precisions()
    os.truncate(copy.path(planner.search) / "summary.json", 9)
    planner = Planner(cell(*lines), Store(copy.root))
    with pytest.raises(MissingSearchError, match=r"damaged.*summary\.json"):
        planner.cell()
    planner.store.materialize(planner.search, execute)
    assert planner.precisions() == expected


def test_changing_a_metric_or_a_tolerance_decodes_nothing(store, tiny_llama):
    base = Planner(cell(*overrides(tiny_llama, store, "scheduler=static")), Store(store)).cell()
    other = Planner(
        cell(
            *overrides(tiny_llama, store, "scheduler=static", "scheduler.tolerance=5", "budget.bootstrap_resamples=99")
        ),
        Store(store),
    ).cell()

    def decoding(c):
        return {n.key for n in c.evaluation.ancestors() if n.stage == "rollouts"}

    assert base.evaluation.key != other.evaluation.key
    assert decoding(base) == decoding(other)


def test_two_models_do_not_share_and_two_schedulers_do(store, tiny_llama):
    def nested(*more: str) -> str:
        return Planner(cell(*overrides(tiny_llama, store, *more)), Store(store)).nested.key

    assert nested("scheduler=high") == nested("scheduler=learned")
    assert nested("quantizer.parent_bits=6") != nested()


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


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (["data.root=/nowhere"], PreflightError, "/nowhere"),
        (["model.path=/no/such/model"], PreflightError, "/no/such/model"),
        (["task.overlong=refuse", "task=dialogsum", "task.max_new_tokens=400"], ValueError, "task.overlong=truncate"),
    ],
)
def test_bad_input_is_refused_before_anything_expensive(tiny_llama, tmp_path, more, error, said):
    lines = overrides(tiny_llama, tmp_path / "store", "scheduler=high")
    changed = {m.partition("=")[0] for m in more}
    kept = [line for line in lines if line.partition("=")[0] not in changed]
    with pytest.raises(error, match=said):
        run_cell(cell(*kept, *more), tmp_path / "out")
    assert not list((tmp_path / "store").glob("sensitivity/*/artifact.json"))


def test_everything_that_is_missing_is_named_at_once(tiny_llama, tmp_path):
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=static") if "metrics" not in o]
    missing = ("model.path=/no/such/model", "data.root=/nowhere", "budget.bertscore_encoder=package:no_such")
    with pytest.raises(PreflightError) as refusal:
        run_cell(cell(*(o for o in lines if "model.path" not in o), *missing), tmp_path / "out")
    said = str(refusal.value)
    assert all(value.partition("=")[2] in said for value in missing)
    assert "model.path" in said


def test_a_second_turn_that_outgrows_the_context_is_named_by_its_sample(store, tiny_llama, tmp_path, two_turns):
    file = two_turns / "mt_bench_prompts" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["prompt"][1] = "and " * 300
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = overrides(tiny_llama, store, "task=mtbench", f"data.root={two_turns}", "data.text_root=samples")
    with pytest.raises(ValueError, match=rf"turn 2 of sample {rows[1]['prompt_id']}\b.*task.max_new_tokens"):
        run_cell(cell(*lines, "scheduler=high"), tmp_path / "out")


def identical(one: Path, two: Path) -> int:
    """Compare the digests of every artifact that both stores hold, times apart; returns how many there were."""
    count = 0
    for manifest in one.glob("*/*/artifact.json"):
        other = two / manifest.relative_to(one)
        if other.exists() and manifest.parts[-3] != "latency":
            assert json.loads(manifest.read_text())["files"] == json.loads(other.read_text())["files"], manifest
            count += 1
    return count


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_a_stage_goes_on_and_ends_bit_identical(tiny_llama, tmp_path, store, how):
    lines = overrides(tiny_llama, tmp_path / "store", "scheduler=high", f"hydra.run.dir={tmp_path / 'out'}")
    command = [sys.executable, "pipelines/run.py", *lines]
    victim = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A job that a shell started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("quantize/*.work")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert victim.poll() is None, "finished before it could be killed"
    os.kill(victim.pid, how)
    said, _ = victim.communicate(timeout=60)
    killed = time.time()
    if how is signal.SIGINT:
        assert victim.returncode == 130
        assert "interrupted" in said
        assert "Traceback" not in said
    assert not list((tmp_path / "store").glob("evaluate/*/artifact.json"))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [texts] = [p for p in (tmp_path / "store").glob("sensitivity/*/artifact.json") if p.stat().st_mtime < killed]
    assert f"sensitivity {texts.parent.name} cached" in " ".join(done.stdout.split())
    assert identical(tmp_path / "store", store) >= 8
    page = (tmp_path / "out" / "index.html").read_text()
    assert "python pipelines/run.py model=hf" in page
    assert list((tmp_path / "out").glob("table_1_*.tex"))


def test_planning_and_reporting_import_no_model_code():
    asked = (
        "import sys, pipelines.run; print('transformers.modeling_utils' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_users_mistake_is_one_line_not_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "pipelines/run.py", "model.low_bits=7", f"hydra.run.dir={tmp_path}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "model.low_bits=7" in said
    assert "Traceback" not in said


def test_a_gpu_that_cannot_run_the_kernels_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise CudaUnavailableError("Tesla T4 is too old: use device=cpu")

    monkeypatch.setattr(run_module, "run_cell", refuse)
    hydra = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(tmp_path)), mode=RunMode.RUN)
    monkeypatch.setattr(run_module, "HydraConfig", SimpleNamespace(get=lambda: hydra))
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=overrides(tmp_path, tmp_path))
    with pytest.raises(SystemExit, match="1"):
        run_module.main.__wrapped__(node)
    assert "error: Tesla T4 is too old: use device=cpu" in caplog.text
