"""Every configuration file composes into a typed cell; a typo or a wrong choice is refused by name."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException

from pipelines.machines import npu_of
from pipelines.schema import register
from pmpd.config import ConfigError, from_omegaconf
from pmpd.stages import STAGES

CONF = Path(__file__).resolve().parents[2] / "conf"


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_context():
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def cell(*overrides: str):
    return from_omegaconf(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("task", choices("task"))
def test_every_model_and_task_compose(model, task):
    overrides = [f"model={model}", f"task={task}", "scheduler=high"]
    if model == "hf":
        overrides.append("model.path=anything")
    if task == "own":
        overrides.append("data.root=anywhere")
    config = cell(*overrides)
    assert (config.model.name, config.task.name) == (model, task)


@pytest.mark.parametrize("group", ["scheduler", "quantizer", "budget", "hardware", "tracking", "data"])
def test_every_choice_composes(group):
    assert choices(group)
    for choice in choices(group):
        chosen = getattr(cell(f"{group}={choice}"), group)
        if group == "tracking":
            name = chosen.mode.value
        elif group == "data":
            name = chosen.root or "hub"
        else:
            name = chosen.name
        assert name == choice


@pytest.mark.parametrize("hardware", [h for h in choices("hardware") if h != "gpu"])
def test_every_other_hardware_is_an_npu(hardware):
    assert npu_of(cell(f"hardware={hardware}").hardware).name == hardware


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hardware.bandwidth_bytes_s=0", r"^hardware\.bandwidth_bytes_s=0\.0: more than 0"),
        ("hardware.bandwidth_efficiency=1.5", r"^hardware\.bandwidth_efficiency=1\.5: \(0, 1\]"),
        ("hardware.activation_buffer_bytes=100", r"^hardware\.activation_buffer_bytes=100: at least 4096"),
    ],
)
def test_an_impossible_npu_is_refused_by_name(override, said):
    with pytest.raises(ConfigError, match=said):
        npu_of(cell(override).hardware)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment):
    assert cell(f"experiment={experiment}").run_name


def test_the_embedded_model_brings_samples_and_the_quick_budget():
    config = cell()
    assert (config.model.name, config.data.root, config.budget.name) == ("smollm2", "samples", "quick")


def test_another_model_gets_the_paper_from_the_hub():
    config = cell("model=vicuna7b", "task=cnndm", "scheduler=learned")
    assert (config.data.root, config.budget.name) == (None, "paper")
    assert (config.model.high_bits, config.model.low_bits) == (3, 2)
    assert (config.budget.calibration_windows, config.budget.seed_prompts, config.budget.seed_new_tokens) == (
        100,
        256,
        256,
    )


def test_what_is_asked_for_wins_over_what_the_model_brings():
    config = cell("model=smollm2", "budget=tiny", "data.root=somewhere")
    assert (config.budget.name, config.data.root) == ("tiny", "somewhere")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hihg_bits=3", "hihg_bits"),
        ("scheduler=sttaic", "static"),
        ("budget.batch_size=many", "batch_size"),
        ("task.metrics=[rogue]", "rouge_l"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_typos_and_unknown_choices_are_refused_by_name(override, said):
    with pytest.raises((HydraException, MissingConfigException)) as caught:
        compose("config", overrides=[override])
    message = "".join(str(e) for e in (caught.value, caught.value.__cause__))
    assert said in message


def test_impossible_combinations_are_refused():
    with pytest.raises(ConfigError, match="one split only"):
        cell("task=mtbench", "scheduler=static")
    cell("task=mtbench", "scheduler=static", "scheduler.switch_step=32")


def test_a_task_that_is_on_no_hub_needs_a_folder():
    with pytest.raises(ConfigError, match=r"data\.root=None is not possible: a folder with own/test\.jsonl"):
        cell("model=vicuna7b", "task=own")
    assert cell("task=own").data.root == "samples"


def test_a_launcher_has_a_job_for_every_stage_that_reads_a_model():
    costs_seconds = {"texts", "prompts", "seeds", "fit_static", "labels", "oracle", "estimate", "gain"}
    of_this_machine = {"latency", "linears"}
    of_its_own_pipeline = {"hyperparameters"}
    jobs = set(cell("launcher=local").launcher.stages)
    assert jobs | costs_seconds | of_this_machine | of_its_own_pipeline == set(STAGES)


def test_a_grid_for_a_matched_scheduler_is_given_to_it():
    with pytest.raises(ConfigError, match=r"scheduler\.grid=.*scheduler\.target\.grid"):
        cell("scheduler=dense_sparse", "scheduler.grid=[0,4]")
    config = cell("scheduler=dense_sparse", "scheduler.target.grid=[0,4]", "scheduler.prefill=fp16")
    assert config.scheduler.target.grid == [0, 4]
    assert config.scheduler.target.prefill.value == "fp16"


def test_options_of_sbatch_are_given_by_name():
    config = cell("launcher=slurm", "launcher.partition=gpu", "+launcher.options.account=mine", "scheduler=high")
    assert (config.launcher.partition, config.launcher.options) == ("gpu", {"account": "mine"})
