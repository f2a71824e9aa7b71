"""What a user mistypes is one line that names the field, the value, what is allowed and what may be meant."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pipelines import answer as answer_module
from pipelines import report, run
from pipelines.answer import ANSWERED, answered
from pipelines.grid import CONF
from pipelines.mistakes import explain
from pipelines.schema import register
from pmpd.config import from_omegaconf

REPOSITORY = CONF.parent


def said_of(*overrides: str) -> str:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ANSWERED) as caught:
        from_omegaconf(compose("config", overrides=list(overrides)))
    return explain(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=vicuna7", "model=vicuna7 is not possible: one of hf, llama3_1_8b, *; did you mean vicuna7b?"),
        ("budegt=quick", "budegt=quick is not possible: there is no field budegt; did you mean budget?"),
        ("+budegt=quick", "+budegt is not possible: there is no field budegt; did you mean budget?"),
        ("experimnt=main", "experimnt=main is not possible: *; did you mean experiment?"),
        ("task.naem=x", "task.naem=x is not possible: there is no field task.naem; did you mean task.name?"),
        ("+model.pth=x", "+model.pth is not possible: there is no field model.pth; did you mean model.path?"),
        ("test_samples=3", "* there is no field test_samples; did you mean budget.test_samples?"),
        ("hardware.bandwith_bytes_s=1", "*; did you mean hardware.bandwidth_bytes_s?"),
        ("zzzz=1", "zzzz=1 is not possible: there is no field zzzz; --cfg job shows all"),
        ("threads=two", "threads=two is not possible: a whole number, or null"),
        ("seed=1.5", "seed=1.5 is not possible: a whole number"),
        ("scheduler.tolerance=low", "scheduler.tolerance=low is not possible: a number"),
        ("model.trust_remote_code=maybe", "model.trust_remote_code=maybe is not possible: true or false"),
        ("model.middle_bits=3", "model.middle_bits=3 is not possible: a list such as [A,B], each a whole number"),
        ("model.max_new_tokens.cnndm=x", "model.max_new_tokens.cnndm=x is not possible: a whole number"),
        ("report=np", "report=np is not possible: one of cells, gpu, npu; did you mean npu?"),
        ("task.metrics=[rouge]", "task.metrics[0]=rouge is not possible: one of rouge_l, *; did you mean rouge_l?"),
        ("model=hf", "model.path is missing: give model.path=..."),
        ("model.path=${foo}", "model.path is not possible: Interpolation key 'foo' not found"),
        (
            "scheduler.options.sigmas=2",
            "scheduler.options.sigmas=2 is not possible: scheduler.options has no sigmas; to add it: "
            "+scheduler.options.sigmas=2",
        ),
        (
            "launcher.stages.quantise.cpus=4",
            "launcher.stages.quantise.cpus=4 is not possible: launcher.stages has no quantise; to add it: in a file of "
            "conf/launcher",
        ),
        (
            "model.max_new_tokens.cndm=9",
            "model.max_new_tokens.cndm=9 is not possible: model.max_new_tokens has no cndm; to add it: "
            "+model.max_new_tokens.cndm=9; did you mean cnndm?",
        ),
        ("+model=vicuna7b", "+model=vicuna7b is not possible: model has a value; to change it: model=vicuna7b"),
        ("seed=0,1", "seed=0,1 is not possible: to run one after another add -m; a list is 'NAME=[A,B]'"),
        ("quick", "quick is not possible: an override is NAME=VALUE, a list 'NAME=[A,B]', a text \"NAME='A, B'\""),
        ("~budgt", "Could not delete from config. 'budgt' does not exist."),
    ],
)
def test_a_mistake_on_the_command_line_names_the_mend(override: str, said: str) -> None:
    assert re.fullmatch(re.escape(said).replace(r"\*", ".*"), said_of(override))


def test_a_field_added_to_what_a_stage_needs_is_refused() -> None:
    said = said_of("launcher=local", "+launcher.stages.quantize.cpu=3")
    assert said.startswith(
        "+launcher.stages.quantize.cpu is not possible: there is no field launcher.stages.quantize.cpu"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "pth: x",
            "model.pth is not possible in model/mine.yaml: there is no field model.pth; did you mean model.path?",
        ),
        ("high_bits: three", "model.high_bits=three is not possible in model/mine.yaml: a whole number, or null"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"defaults: [/schema/model@_here_, _self_]\nname: mine\n{line}\n")
    assert said_of("model=mine", f"hydra.searchpath=[file://{tmp_path}]") == said


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\npath: a: b\n")
    said = said_of("model=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert "model/mine.yaml" in said
    assert "line 2" in said
    assert "\n" not in said


def script(name: str) -> object:
    """What the script's last line runs."""
    return importlib.import_module(f"pipelines.{name}").main


SCRIPTS = [
    "run",
    pytest.param(
        "tune",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("hydra_plugins") is None
            or importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
            reason="hydra-optuna-sweeper is not installed: pip install 'pmpd[tune]'",
        ),
    ),
]


@pytest.fixture
def as_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # conf/ is found from the script's file, as when it is one
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("override", ["model=vicuna7", "budegt=quick", "threads=two"])
def test_a_hydra_script_says_it_and_fails(
    as_script: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    name: str,
    override: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", override])
    with pytest.raises(SystemExit) as ended:
        answered(script(name))
    assert ended.value.code == 1
    assert [r.getMessage() for r in caplog.records] == [f"error: {said_of(override)}"]
    assert capfd.readouterr() == ("", "")


def test_a_field_of_what_is_null_is_refused_and_an_assertion_of_ours_is_not_answered(
    as_script: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "scheduler.target.name=static"])
    with pytest.raises(SystemExit, match="1"):
        answered(run.main)
    [said] = [r.getMessage() for r in caplog.records]
    assert (
        said
        == "error: scheduler.target.name=static is not possible: scheduler.target is null here, so it has no fields"
    )

    def ours() -> None:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        answered(ours)


def test_the_report_says_it_and_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "experiment=mian"])
    assert report.main() == 1
    [said] = [r.getMessage() for r in caplog.records]
    assert said.startswith("error: experiment=mian is not possible: one of features, ")
    assert said.endswith("; did you mean main?")


def test_who_asks_for_whole_errors_gets_them(as_script: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "WHOLE", True)
    monkeypatch.setattr(sys, "argv", ["run.py", "model=vicuna7"])
    with pytest.raises(ANSWERED, match="Available options in 'model'"):
        answered(run.main)


@pytest.mark.parametrize("override", ["model=vicuna7,smollm2", "threads=1,two"])
def test_a_sweep_says_it_and_fails(tmp_path: Path, override: str) -> None:
    command = [sys.executable, "pipelines/run.py", "-m", override, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    wrong = {"model=vicuna7,smollm2": "model=vicuna7", "threads=1,two": "threads=two"}[override]
    assert (done.stdout, done.stderr) == (f"error: {said_of(wrong)}\n", "")
