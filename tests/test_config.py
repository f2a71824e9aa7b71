"""Every impossible combination is refused by name, with what is allowed."""

import dataclasses

import pytest

from pmpd.config import (
    BudgetConfig,
    Config,
    ConfigError,
    Level,
    Metric,
    ModelConfig,
    NpuConfig,
    QuantizerConfig,
    QuantizerKind,
    SchedulerConfig,
    SchedulerKind,
    Solver,
    TaskConfig,
    TaskKind,
    check,
    grid,
    max_new_tokens,
)


def valid() -> Config:
    return Config(
        model=ModelConfig(name="m", path="p", high_bits=4, low_bits=3, max_new_tokens={"cnndm": 60}),
        task=TaskConfig(
            name="cnndm",
            kind=TaskKind.summarization,
            dataset="d",
            hub_path="h",
            prompt="{document}",
            metrics=[Metric.rouge_l],
        ),
        scheduler=SchedulerConfig(name="static", kind=SchedulerKind.static),
        quantizer=QuantizerConfig(name="q", kind=QuantizerKind.anyprec),
        budget=BudgetConfig(
            name="b",
            calibration_windows=1,
            calibration_window_tokens=8,
            search_windows=1,
            search_window_tokens=8,
            validation_samples=1,
            seed_prompts=1,
            seed_max_prompt_tokens=40,
            seed_new_tokens=4,
            bertscore_encoder="e",
        ),
        hardware=NpuConfig(name="h", num_macs=1, clock_hz=1.0, bandwidth_bytes_s=1.0),
    )


def with_(path: str, value: object) -> Config:
    group, _, name = path.partition(".")
    config = valid()
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


def test_a_valid_cell_passes():
    check(valid())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.low_bits", 4, r"model\.low_bits=4 .* below model\.high_bits \(4\)"),
        ("model.high_bits", 9, r"model\.high_bits=9 .* 2 to 8"),
        ("model.low_bits", 1, r"model\.low_bits=1 .* 2 to 8"),
        ("model.middle_bits", [4], r"model\.middle_bits=\[4\] .* strictly between 4 and 3"),
        ("scheduler.prefill_bits", 12, r"scheduler\.prefill_bits=12 .* 16, or 2 to 8"),
        ("scheduler.switch_step", 61, r"scheduler\.switch_step=61 .* 0 to max_new_tokens \(60\)"),
        ("scheduler.bits", 4, r"scheduler\.bits=4 .* only for it"),
        ("scheduler.switch_steps", [3, 5], r"scheduler\.switch_steps=\[3, 5\] .* 1 steps for 2 precisions"),
        ("scheduler.grid_parts", 0, r"scheduler\.grid_parts=0 .* 1 to max_new_tokens"),
        ("scheduler.pattern", [Level.high], r"scheduler\.pattern=\['high'\] .* only for it"),
        ("scheduler.policy", "learned", r"scheduler\.policy=learned .* only for it"),
        ("scheduler.target", SchedulerConfig(name="t", kind=SchedulerKind.static), r"scheduler\.target=.* only for it"),
        ("scheduler.grid", [0, 99], r"scheduler\.grid=\[0, 99\] .* max_new_tokens \(60\)"),
        ("task.metrics", [Metric.bleu], r"task\.metrics=bleu .* rouge_l, bertscore"),
        ("task.metrics", [], r"task\.metrics=\[\]"),
        ("task.max_new_tokens", 1, r"task\.max_new_tokens=1"),
        ("task.validation_split", None, r"scheduler=static .* give scheduler\.switch_step"),
        ("task.name", "other", r"model\.max_new_tokens names no task 'other'"),
        ("quantizer.parent_bits", 1, r"quantizer\.parent_bits=1"),
        ("quantizer.seed_bits", 0, r"quantizer\.seed_bits=0"),
        ("quantizer.sensitivity_power", 2, r"quantizer\.sensitivity_power=2.* 1 \(the paper\)"),
        ("quantizer.high_share", 0, r"quantizer\.high_share=0.* more than 0"),
        ("quantizer.outlier_share", 0.01, r"quantizer\.outlier_share=0\.01 .* quantizer=joint has it"),
        ("quantizer.tuning_rate", 0, r"quantizer\.tuning_rate=0.* more than 0"),
        ("quantizer.tuning_steps", -1, r"quantizer\.tuning_steps=-1 .* 0 or more"),
        ("quantizer.group_size", 48, r"quantizer\.group_size=48 .* multiple of 32"),
        ("budget.batch_size", 0, r"budget\.batch_size=0"),
        ("scheduler.holdout", 1.0, r"scheduler\.holdout=1\.0"),
    ],
)
def test_impossible_values_are_refused_by_name(path, value, message):
    with pytest.raises(ConfigError, match=message):
        check(with_(path, value))


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (
            QuantizerKind.joint,
            "sensitivity_power",
            0.75,
            r"quantizer\.sensitivity_power=0\.75 .* 1\.0 with quantizer=joint",
        ),
        (QuantizerKind.joint, "solver", Solver.lloyd, r"quantizer\.solver=lloyd .* exact with quantizer=joint"),
        (QuantizerKind.anyprec, "high_share", 0.5, r"quantizer\.high_share=0\.5 .* 0\.25 with quantizer=anyprec"),
        (QuantizerKind.anyprec, "sweeps", 3, r"quantizer\.sweeps=3 .* quantizer=joint has it"),
        (QuantizerKind.anyprec, "focus_bits", 3, r"quantizer\.focus_bits=3 .* quantizer=joint has it"),
    ],
)
def test_an_option_of_the_other_quantiser_is_refused(kind, name, value, message):
    config = with_("quantizer.kind", kind)
    check(config)
    setattr(config.quantizer, name, value)
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize("kind", [SchedulerKind.fp16, SchedulerKind.high, SchedulerKind.low])
def test_uniform_schedulers_take_no_prefill_bits(kind):
    config = with_("scheduler.kind", kind)
    config.scheduler.prefill_bits = 4
    with pytest.raises(ConfigError, match="prefill included"):
        check(config)


def test_a_given_switch_step_joins_the_grid():
    assert grid(valid()) == (0, 20, 40, 60)
    assert grid(with_("scheduler.switch_step", 30)) == (0, 20, 30, 40, 60)
    assert grid(with_("scheduler.grid", [5, 0])) == (0, 5)


def test_the_budget_caps_the_models_tokens_but_not_the_users():
    config = with_("budget.max_new_tokens", 16)
    assert max_new_tokens(config) == 16
    config.task.max_new_tokens = 50
    assert max_new_tokens(config) == 50
