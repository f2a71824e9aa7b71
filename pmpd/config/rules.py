"""The rules that refuse an impossible cell, by field, value and what is allowed; and what follows from its fields."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NoReturn

from pmpd.config.schema import Config, Level, Metric, QuantizerConfig, QuantizerKind, SchedulerKind, TaskKind
from pmpd.records import FP16_BITS, switch_grid

UNIFORM = (SchedulerKind.fp16, SchedulerKind.high, SchedulerKind.low, SchedulerKind.uniform)
"""Kinds that run prefill and every decode step at one precision."""

OWN_OPTIONS = {
    QuantizerKind.anyprec: ("solver", "sensitivity_power"),
    QuantizerKind.joint: ("focus_bits", "high_share", "sweeps", "outlier_share"),
}
"""Options of one quantiser that the other would ignore."""


class ConfigError(ValueError):
    """A configuration that composes but cannot be run; the message names field, value and what is allowed."""


def max_new_tokens(config: Config) -> int:
    """M of this cell: the task's own if given, else the model's for that task, cut to the budget's cap."""
    task, model, budget = config.task, config.model, config.budget
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    tokens = model.max_new_tokens.get(task.name)
    if tokens is None:
        raise ConfigError(
            f"model.max_new_tokens names no task {task.name!r} (it has {sorted(model.max_new_tokens)}); "
            "give task.max_new_tokens=N"
        )
    return min(tokens, budget.max_new_tokens) if budget.max_new_tokens else tokens


def grid(config: Config) -> tuple[int, ...]:
    """Candidate switch steps: the scheduler's own list, or the multiples of M / ``grid_parts`` (the paper: thirds),
    with given steps added."""
    scheduler = config.scheduler
    steps = tuple(scheduler.grid) if scheduler.grid else switch_grid(max_new_tokens(config), scheduler.grid_parts)
    return tuple(sorted({*steps, *(given_steps(config) or ())}))


def given_steps(config: Config) -> tuple[int, ...] | None:
    """The switch steps that the user gave, None where they are to be found."""
    scheduler = config.scheduler
    if scheduler.switch_step is not None:
        return (scheduler.switch_step,)
    return None if scheduler.switch_steps is None else tuple(scheduler.switch_steps)


def check(config: Config) -> None:
    """Refuse, by name, what a type cannot.

    Raises:
        ConfigError: the field, its value and what is allowed.
    """
    _check_quantizer(config)
    _check_precisions(config)
    _check_scheduler(config)
    _check_task(config)
    _check_amounts(config)


def check_precisions(high_bits: int, low_bits: int, middle_bits: list[int]) -> None:
    """Refuse precisions that do not step down.

    Raises:
        ConfigError: ``high_bits``, ``middle_bits``, ``low_bits`` are not strictly falling.
    """
    levels = [high_bits, *middle_bits, low_bits]
    if low_bits >= high_bits:
        _refuse("model.low_bits", low_bits, f"below model.high_bits ({high_bits})")
    if any(a <= b for a, b in itertools.pairwise(levels)):
        _refuse("model.middle_bits", middle_bits, f"strictly between {high_bits} and {low_bits}, falling")


def check_dense_sparse(config: Config) -> None:
    """Refuse options of the nested model that a dense-and-sparse one, k-means at one precision, would not follow.

    Asked when a cell is planned, so that in a sweep under such options the other schedulers' cells are built.

    Raises:
        ConfigError: another quantiser than ``anyprec``, or an option whose default is not kept.
    """
    quantizer, defaults = config.quantizer, QuantizerConfig()
    why = f"with scheduler={config.scheduler.name}, whose dense part is plain k-means"
    if quantizer.kind is not QuantizerKind.anyprec:
        _refuse("quantizer", quantizer.kind.value, f"{QuantizerKind.anyprec.value} {why}")
    for name in ("sensitivity_power", "refits", "tuning_steps"):
        if (value := getattr(quantizer, name)) != getattr(defaults, name):
            _refuse(f"quantizer.{name}", value, f"{getattr(defaults, name)} {why}")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{name}={value} is not possible: {allowed}")


def _nested(config: Config) -> tuple[range, str]:
    """The precisions of the nested model, and how a message names them."""
    nested = range(config.quantizer.seed_bits, config.quantizer.parent_bits + 1)
    return nested, f"{nested.start} to {nested.stop - 1}, the range of quantizer.seed_bits and quantizer.parent_bits"


def _check_quantizer(config: Config) -> None:
    quantizer = config.quantizer
    if not 1 <= quantizer.seed_bits <= 8:
        _refuse("quantizer.seed_bits", quantizer.seed_bits, "1 to 8")
    if not quantizer.seed_bits <= quantizer.parent_bits <= 8:
        _refuse("quantizer.parent_bits", quantizer.parent_bits, f"seed_bits ({quantizer.seed_bits}) to 8")
    if quantizer.group_size is not None and (quantizer.group_size < 32 or quantizer.group_size % 32):
        _refuse("quantizer.group_size", quantizer.group_size, "null, or a multiple of 32")
    if not 0 <= quantizer.sensitivity_power <= 1:
        _refuse("quantizer.sensitivity_power", quantizer.sensitivity_power, "0 (all weights the same) to 1 (the paper)")
    if not 0 < quantizer.high_share <= 1:
        _refuse("quantizer.high_share", quantizer.high_share, "more than 0, at most 1")
    if not quantizer.damping > 0:
        _refuse("quantizer.damping", quantizer.damping, "more than 0: a second moment may be rank-deficient")
    if not 0 <= quantizer.outlier_share <= 0.1:
        _refuse("quantizer.outlier_share", quantizer.outlier_share, "0 to 0.1")
    if not quantizer.tuning_rate > 0:
        _refuse("quantizer.tuning_rate", quantizer.tuning_rate, "more than 0")
    if quantizer.tuning_steps and quantizer.tuning_bits < quantizer.seed_bits:
        _refuse("quantizer.tuning_bits", quantizer.tuning_bits, f"seed_bits ({quantizer.seed_bits}) or more")
    for name in ("refits", "sweeps", "tuning_steps"):
        if getattr(quantizer, name) < 0:
            _refuse(f"quantizer.{name}", getattr(quantizer, name), "0 or more")
    defaults = QuantizerConfig()
    for kind, names in OWN_OPTIONS.items():
        for name in names:
            value, default = getattr(quantizer, name), getattr(defaults, name)
            if quantizer.kind is not kind and value != default:
                allowed = getattr(default, "value", default)
                other = f"{allowed} with quantizer={quantizer.kind.value}; quantizer={kind.value} has it"
                _refuse(f"quantizer.{name}", getattr(value, "value", value), other)


def _check_precisions(config: Config) -> None:
    model, scheduler = config.model, config.scheduler
    nested, span = _nested(config)
    for name, bits in (("high_bits", model.high_bits), ("low_bits", model.low_bits)):
        if bits is not None and bits not in nested:
            _refuse(f"model.{name}", bits, span)
    for bits in model.middle_bits:
        if bits not in nested:
            _refuse("model.middle_bits", model.middle_bits, span)
    if model.high_bits is not None and model.low_bits is not None:
        check_precisions(model.high_bits, model.low_bits, model.middle_bits)
    if scheduler.prefill_bits is not None and scheduler.prefill_bits not in (*nested, FP16_BITS):
        _refuse("scheduler.prefill_bits", scheduler.prefill_bits, f"{FP16_BITS}, or {span}")
    if (scheduler.kind is SchedulerKind.uniform) != (scheduler.bits is not None):
        _refuse("scheduler.bits", scheduler.bits, "a precision for kind=uniform, and only for it")
    if scheduler.bits is not None and scheduler.bits not in (*nested, FP16_BITS):
        _refuse("scheduler.bits", scheduler.bits, f"{FP16_BITS}, or {span}")
    if scheduler.kind in UNIFORM:
        why = f"{scheduler.name} is uniform, prefill included"
        if scheduler.prefill_bits is not None:
            _refuse("scheduler.prefill_bits", scheduler.prefill_bits, f"null: {why}")
        if scheduler.prefill is not Level.high:
            _refuse("scheduler.prefill", scheduler.prefill.value, f"high, which has no effect: {why}")


def _check_scheduler(config: Config) -> None:
    task, scheduler = config.task, config.scheduler
    tokens = max_new_tokens(config)
    if tokens < 2:
        _refuse("task.max_new_tokens", tokens, "at least 2, so that there is a decode step")
    if scheduler.switch_step is not None and scheduler.switch_steps is not None:
        _refuse("scheduler.switch_steps", list(scheduler.switch_steps), "null beside scheduler.switch_step")
    given, levels = given_steps(config), 2 + len(config.model.middle_bits)
    name = "scheduler.switch_step" if scheduler.switch_steps is None else "scheduler.switch_steps"
    if given is not None:
        shown = given[0] if scheduler.switch_steps is None else list(given)
        if scheduler.kind is not SchedulerKind.static:
            _refuse(name, shown, "only scheduler=static takes one")
        if len(given) != levels - 1:
            _refuse(
                name, shown, f"{levels - 1} steps for {levels} precisions (model.middle_bits); give switch_steps=[...]"
            )
        if any(not 0 <= step <= tokens for step in given):
            _refuse(name, shown, f"0 to max_new_tokens ({tokens})")
        if list(given) != sorted(given):
            _refuse(name, shown, "steps that do not fall")
    for step in scheduler.grid or ():
        if not 0 <= step <= tokens:
            _refuse("scheduler.grid", list(scheduler.grid or ()), f"steps from 0 to max_new_tokens ({tokens})")
    if scheduler.kind in (SchedulerKind.policy, SchedulerKind.oracle) and scheduler.grid is not None:
        _refuse(
            "scheduler.grid",
            list(scheduler.grid),
            f"null: classes are fractions of M, for {scheduler.name} as for every scheduler that chooses a prompt at a "
            "time; scheduler.grid_parts makes them finer",
        )
    if not 1 <= scheduler.grid_parts <= tokens:
        _refuse("scheduler.grid_parts", scheduler.grid_parts, f"1 to max_new_tokens ({tokens})")
    if scheduler.kind is SchedulerKind.static and given is None and task.validation_split is None:
        _refuse(
            "scheduler",
            scheduler.name,
            f"{task.name} has one split only, so nothing to fit on; give scheduler.switch_step=S "
            f"(0 to {tokens}), fitted elsewhere",
        )
    if (scheduler.kind is SchedulerKind.dense_sparse) != (scheduler.target is not None):
        _refuse("scheduler.target", scheduler.target, "a scheduler for kind=dense_sparse, and only for it")
    if scheduler.target is not None:
        if scheduler.grid is not None:
            _refuse("scheduler.grid", list(scheduler.grid), "null: scheduler.target.grid is of the scheduler to match")
        if scheduler.target.kind not in (SchedulerKind.static, SchedulerKind.policy):
            _refuse("scheduler.target", scheduler.target.name, "one that steps down, such as static or learned")
        _check_scheduler(dataclasses.replace(config, scheduler=scheduler.target))
    if (scheduler.kind is SchedulerKind.pattern) != bool(scheduler.pattern):
        _refuse("scheduler.pattern", [p.value for p in scheduler.pattern], "a list for kind=pattern, and only for it")
    if (scheduler.kind is SchedulerKind.policy) != (scheduler.policy is not None):
        _refuse("scheduler.policy", scheduler.policy, "a name for kind=policy, and only for it")
    if not scheduler.features:
        _refuse("scheduler.features", [], "at least one")
    if not 0 < scheduler.holdout < 1:
        _refuse("scheduler.holdout", scheduler.holdout, "between 0 and 1, both excluded")
    if not 0 <= scheduler.dropout < 1:
        _refuse("scheduler.dropout", scheduler.dropout, "0 to below 1")


def _check_task(config: Config) -> None:
    task = config.task
    if task.hub_path is None and config.data.root is None:
        _refuse("data.root", None, f"a folder with {task.dataset}/{task.test_split}.jsonl, as {task.name} is on no hub")
    allowed = {
        TaskKind.summarization: (Metric.rouge_l, Metric.bertscore),
        TaskKind.dialogue: (Metric.rouge_l, Metric.bertscore),
        TaskKind.translation: (Metric.bleu, Metric.sacrebleu),
    }[task.kind]
    for metric in task.metrics:
        if metric not in allowed:
            _refuse("task.metrics", metric.value, f"{task.name} offers {', '.join(m.value for m in allowed)}")
    if not task.metrics:
        _refuse("task.metrics", [], f"at least one of {', '.join(m.value for m in allowed)}")


def _check_amounts(config: Config) -> None:
    scheduler, budget = config.scheduler, config.budget
    positive = {
        "budget.calibration_windows": budget.calibration_windows,
        "budget.calibration_window_tokens": budget.calibration_window_tokens,
        "budget.search_windows": budget.search_windows,
        "budget.validation_samples": budget.validation_samples,
        "budget.test_samples": budget.test_samples,
        "budget.seed_prompts": budget.seed_prompts,
        "budget.seed_new_tokens": budget.seed_new_tokens,
        "budget.batch_size": budget.batch_size,
        "budget.timing_tokens": budget.timing_tokens,
        "budget.timing_contexts": min(budget.timing_contexts, default=0),
        "budget.bootstrap_resamples": budget.bootstrap_resamples,
        "scheduler.epochs": scheduler.epochs,
        "scheduler.train_batch": scheduler.train_batch,
        "scheduler.learning_rate": scheduler.learning_rate,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            _refuse(name, value, "more than 0")
    for name, number in (
        ("budget.search_tolerance", budget.search_tolerance),
        ("scheduler.tolerance", scheduler.tolerance),
        ("scheduler.weight_decay", scheduler.weight_decay),
        ("seed", config.seed),
    ):
        if not number >= 0:
            _refuse(name, number, "0 or more")
    for stage, needs in config.launcher.stages.items():
        for name, number, least in (
            ("cpus", needs.cpus, 1),
            ("gpus", needs.gpus, 0),
            ("memory_gib", needs.memory_gib, 0.1),
            ("minutes", needs.minutes, 1),
        ):
            if number < least:
                _refuse(f"launcher.stages.{stage}.{name}", number, f"{least} or more")
    if config.launcher.retries < 0:
        _refuse("launcher.retries", config.launcher.retries, "0 or more")
    if budget.search_window_tokens < 4:
        _refuse("budget.search_window_tokens", budget.search_window_tokens, "at least 4")
    if budget.seed_max_prompt_tokens < 33:
        _refuse("budget.seed_max_prompt_tokens", budget.seed_max_prompt_tokens, "at least 33: cuts start at 32 tokens")
