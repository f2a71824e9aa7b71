"""What cannot be run is refused in a line that names it, before anything expensive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode

from pipelines import run as run_module
from pipelines.grid import CONF
from pipelines.preflight import PreflightError
from pipelines.run import run_cell
from pipelines.schema import register
from pmpd.kernels import CudaUnavailableError
from tests.pipelines.cells import cell, overrides

REPOSITORY = Path(__file__).resolve().parents[2]


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


def test_a_folder_without_plain_text_is_told_of_other_folders(tiny_llama, tmp_path):
    (tmp_path / "data" / "own").mkdir(parents=True)
    (tmp_path / "data" / "own" / "test.jsonl").write_text('{"document": "Yes."}\n')
    lines = [o for o in overrides(tiny_llama, tmp_path / "store", "scheduler=high") if o != "data=samples"]
    with pytest.raises(PreflightError, match=r"has no c4/validation\.jsonl(.|\n)*data\.text_root=samples"):
        run_cell(cell(*lines, "task=own", f"data.root={tmp_path / 'data'}"), tmp_path / "out")


def test_a_second_turn_that_outgrows_the_context_is_named_by_its_sample(store, tiny_llama, tmp_path, two_turns):
    file = two_turns / "mt_bench_prompts" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["prompt"][1] = "and " * 300
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = overrides(tiny_llama, store, "task=mtbench", f"data.root={two_turns}", "data.text_root=samples")
    with pytest.raises(ValueError, match=rf"turn 2 of sample {rows[1]['prompt_id']}\b.*task.max_new_tokens"):
        run_cell(cell(*lines, "scheduler=high"), tmp_path / "out")


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
