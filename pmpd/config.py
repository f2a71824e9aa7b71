"""The typed configuration of one cell, and the rules that refuse an impossible one.

A *cell* is one model, one task, one scheduler at one budget: one row of a table. Every field's comment
in ``conf/`` says what it means to a user; here stand types, defaults and the checks that need more than
a type. This is the only module of the library that imports OmegaConf; Hydra composes, in ``pipelines``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf

from pmpd.records import FP16_BITS, switch_grid


class DType(Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Metric(Enum):
    rouge_l = "rouge_l"
    bertscore = "bertscore"
    bleu = "bleu"
    sacrebleu = "sacrebleu"


class TaskKind(Enum):
    summarization = "summarization"
    translation = "translation"
    dialogue = "dialogue"


class SchedulerKind(Enum):
    fp16 = "fp16"
    high = "high"
    low = "low"
    static = "static"
    learned = "learned"


class QuantizerKind(Enum):
    anyprec = "anyprec"
    joint = "joint"


class Solver(Enum):
    exact = "exact"
    lloyd = "lloyd"


class Overlong(Enum):
    refuse = "refuse"
    truncate = "truncate"


class ReportKind(Enum):
    cells = "cells"
    gpu = "gpu"
    npu = "npu"


class TrackingMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class ModelConfig:
    name: str = MISSING
    path: str = MISSING
    revision: Optional[str] = None
    dtype: DType = DType.float16
    prompt: str = "tokenizer"
    high_bits: Optional[int] = None
    low_bits: Optional[int] = None
    middle_bits: list[int] = field(default_factory=list)
    max_new_tokens: dict[str, int] = field(default_factory=dict)
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    root: Optional[str] = None
    text_root: Optional[str] = None


@dataclass
class TaskConfig:
    name: str = MISSING
    kind: TaskKind = MISSING
    dataset: str = MISSING
    hub_path: str = MISSING
    hub_config: Optional[str] = None
    hub_revision: str = "main"
    validation_split: Optional[str] = "validation"
    test_split: str = "test"
    prompt: str = MISSING
    metrics: list[Metric] = MISSING
    max_new_tokens: Optional[int] = None
    min_reference_words: int = 0
    overlong: Overlong = Overlong.refuse


@dataclass
class SchedulerConfig:
    name: str = MISSING
    kind: SchedulerKind = MISSING
    prefill_bits: Optional[int] = None
    grid: Optional[list[int]] = None
    switch_step: Optional[int] = None
    tolerance: float = 0.0
    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    train_batch: int = 32
    holdout: float = 0.1


@dataclass
class QuantizerConfig:
    name: str = MISSING
    seed_bits: int = 2
    parent_bits: int = 8
    group_size: Optional[int] = None
    kind: QuantizerKind = MISSING
    solver: Solver = Solver.exact
    focus_bits: int = 4
    high_share: float = 0.0
    damping: float = 0.01
    refits: int = 6
    sweeps: int = 2
    outlier_share: float = 0.0
    tuning_steps: int = 0
    tuning_bits: int = 4
    tuning_rate: float = 0.001


@dataclass
class BudgetConfig:
    name: str = MISSING
    calibration_windows: int = MISSING
    calibration_window_tokens: int = MISSING
    search_windows: int = MISSING
    search_window_tokens: int = MISSING
    search_tolerance: float = 0.05
    validation_samples: int = MISSING
    test_samples: Optional[int] = None
    seed_prompts: int = MISSING
    seed_max_prompt_tokens: int = MISSING
    seed_new_tokens: int = MISSING
    max_new_tokens: Optional[int] = None
    batch_size: int = 16
    timing_tokens: int = 32
    timing_contexts: list[int] = field(default_factory=lambda: [512])
    bootstrap_resamples: int = 1000
    bertscore_encoder: str = MISSING
    text_dataset: str = "c4"
    text_hub_path: str = "allenai/c4"
    text_hub_config: Optional[str] = "en"
    text_hub_revision: str = "main"
    text_split: str = "validation"
    text_rows: int = 3000


@dataclass
class HardwareConfig:
    """What the gain is of: its subclasses are the kinds that there are."""

    name: str = MISSING


@dataclass
class GpuConfig(HardwareConfig):
    linear_forwards: int = 100


@dataclass
class NpuConfig(HardwareConfig):
    num_macs: int = MISSING
    clock_hz: float = MISSING
    bandwidth_bytes_s: float = MISSING
    bandwidth_efficiency: float = 1.0
    kv_bandwidth_efficiency: Optional[float] = None
    region_efficiency: float = 1.0
    matrix_utilisation: float = 1.0
    matrix_tile_tokens: int = 1
    matrix_tile_outputs: int = 1
    matrix_tile_inputs: int = 1
    matrix_fill_cycles: int = 0
    matrix_vector_utilisation: float = 1.0
    matrix_vector_tile_outputs: int = 1
    matrix_vector_tile_inputs: int = 1
    vector_lanes: Optional[int] = None
    activation_bits: int = 8
    kv_bits: int = 8
    activation_buffer_bytes: Optional[int] = None
    weight_buffer_bytes: Optional[int] = None
    count_head: bool = False
    head_bits: int = 16
    count_tables: bool = False
    table_entry_bits: int = 16
    scale_bits: int = 0
    nested_layout: bool = True


@dataclass
class TrackingConfig:
    mode: TrackingMode = TrackingMode.offline
    project: str = "pmpd"
    entity: Optional[str] = None
    dir: str = "outputs/wandb"


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportKind = ReportKind.cells
    seed: int = 0
    device: Device = Device.auto
    threads: Optional[int] = None
    store: str = "outputs/store"
    run_name: str = "run"


class ConfigError(ValueError):
    """A configuration that composes but cannot be run; the message names field, value and what is allowed."""


def from_omegaconf(node: Any) -> Config:
    """The typed, checked configuration behind a composed OmegaConf node.

    Raises:
        ConfigError: a combination that cannot be run.
        omegaconf.errors.OmegaConfBaseException: a missing or ill-typed field.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), node)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


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
    """Candidate switch steps: the scheduler's own list or the paper's thirds of M, with a given step added."""
    steps = tuple(config.scheduler.grid) if config.scheduler.grid else switch_grid(max_new_tokens(config))
    given = () if config.scheduler.switch_step is None else (config.scheduler.switch_step,)
    return tuple(sorted({*steps, *given}))


def check(config: Config) -> None:
    """Refuse, by name, what a type cannot.

    Raises:
        ConfigError: the field, its value and what is allowed.
    """
    model, task, scheduler = config.model, config.task, config.scheduler
    quantizer, budget = config.quantizer, config.budget

    def refuse(name: str, value: object, allowed: str) -> None:
        raise ConfigError(f"{name}={value} is not possible: {allowed}")

    if not 1 <= quantizer.seed_bits <= 8:
        refuse("quantizer.seed_bits", quantizer.seed_bits, "1 to 8")
    if not quantizer.seed_bits <= quantizer.parent_bits <= 8:
        refuse("quantizer.parent_bits", quantizer.parent_bits, f"seed_bits ({quantizer.seed_bits}) to 8")
    if quantizer.group_size is not None and (quantizer.group_size < 32 or quantizer.group_size % 32):
        refuse("quantizer.group_size", quantizer.group_size, "null, or a multiple of 32")

    if not 0 <= quantizer.high_share <= 1:
        refuse("quantizer.high_share", quantizer.high_share, "0 to 1")
    if not quantizer.damping > 0:
        refuse("quantizer.damping", quantizer.damping, "more than 0: a second moment may be rank-deficient")
    if quantizer.outlier_share and quantizer.kind is not QuantizerKind.joint:
        refuse("quantizer.outlier_share", quantizer.outlier_share, "0 with quantizer=anyprec; quantizer=joint has it")
    if not 0 <= quantizer.outlier_share <= 0.1:
        refuse("quantizer.outlier_share", quantizer.outlier_share, "0 to 0.1")
    if not quantizer.tuning_rate > 0:
        refuse("quantizer.tuning_rate", quantizer.tuning_rate, "more than 0")
    for name in ("refits", "sweeps", "tuning_steps"):
        steps = getattr(quantizer, name)
        if steps < 0:
            refuse(f"quantizer.{name}", steps, "0 or more")

    nested = range(quantizer.seed_bits, quantizer.parent_bits + 1)
    span = f"{nested.start} to {nested.stop - 1}, the range of quantizer.seed_bits and quantizer.parent_bits"
    for name, bits in (("high_bits", model.high_bits), ("low_bits", model.low_bits)):
        if bits is not None and bits not in nested:
            refuse(f"model.{name}", bits, span)
    for bits in model.middle_bits:
        if bits not in nested:
            refuse("model.middle_bits", model.middle_bits, span)
    if model.high_bits is not None and model.low_bits is not None:
        check_precisions(model.high_bits, model.low_bits, model.middle_bits)
    if scheduler.prefill_bits is not None and scheduler.prefill_bits not in (*nested, FP16_BITS):
        refuse("scheduler.prefill_bits", scheduler.prefill_bits, f"{FP16_BITS}, or {span}")
    uniform = scheduler.kind in (SchedulerKind.fp16, SchedulerKind.high, SchedulerKind.low)
    if uniform and scheduler.prefill_bits is not None:
        refuse("scheduler.prefill_bits", scheduler.prefill_bits, f"null: {scheduler.name} is uniform, prefill included")

    tokens = max_new_tokens(config)
    if tokens < 2:
        refuse("task.max_new_tokens", tokens, "at least 2, so that there is a decode step")
    if scheduler.switch_step is not None and scheduler.kind is not SchedulerKind.static:
        refuse("scheduler.switch_step", scheduler.switch_step, "only scheduler=static takes one")
    if scheduler.switch_step is not None and model.middle_bits:
        refuse("scheduler.switch_step", scheduler.switch_step, "null with model.middle_bits, which needs several")
    if scheduler.switch_step is not None and not 0 <= scheduler.switch_step <= tokens:
        refuse("scheduler.switch_step", scheduler.switch_step, f"0 to max_new_tokens ({tokens})")
    for step in scheduler.grid or ():
        if not 0 <= step <= tokens:
            refuse("scheduler.grid", list(scheduler.grid or ()), f"steps from 0 to max_new_tokens ({tokens})")
    if scheduler.kind is SchedulerKind.learned and scheduler.grid is not None:
        refuse("scheduler.grid", scheduler.grid, "null: the learned scheduler's classes are 0, M/3, 2M/3, M")
    if scheduler.kind is SchedulerKind.static and scheduler.switch_step is None and task.validation_split is None:
        refuse(
            "scheduler",
            scheduler.name,
            f"{task.name} has one split only, so nothing to fit on; give scheduler.switch_step=S "
            f"(0 to {tokens}), fitted elsewhere",
        )

    allowed = {
        TaskKind.summarization: (Metric.rouge_l, Metric.bertscore),
        TaskKind.dialogue: (Metric.rouge_l, Metric.bertscore),
        TaskKind.translation: (Metric.bleu, Metric.sacrebleu),
    }[task.kind]
    for metric in task.metrics:
        if metric not in allowed:
            refuse("task.metrics", metric.value, f"{task.name} offers {', '.join(m.value for m in allowed)}")
    if not task.metrics:
        refuse("task.metrics", [], f"at least one of {', '.join(m.value for m in allowed)}")

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
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            refuse(name, value, "more than 0")
    for name, number in (
        ("budget.search_tolerance", budget.search_tolerance),
        ("scheduler.tolerance", scheduler.tolerance),
        ("seed", config.seed),
    ):
        if not number >= 0:
            refuse(name, number, "0 or more")
    if budget.search_window_tokens < 4:
        refuse("budget.search_window_tokens", budget.search_window_tokens, "at least 4")
    if budget.seed_max_prompt_tokens < 33:
        refuse("budget.seed_max_prompt_tokens", budget.seed_max_prompt_tokens, "at least 33: cuts start at 32 tokens")
    if not 0 < scheduler.holdout < 1:
        refuse("scheduler.holdout", scheduler.holdout, "between 0 and 1, both excluded")
    if not 0 <= scheduler.dropout < 1:
        refuse("scheduler.dropout", scheduler.dropout, "0 to below 1")


def check_precisions(high_bits: int, low_bits: int, middle_bits: list[int]) -> None:
    """Refuse precisions that do not step down.

    Raises:
        ConfigError: ``high_bits``, ``middle_bits``, ``low_bits`` are not strictly falling.
    """
    levels = [high_bits, *middle_bits, low_bits]
    if low_bits >= high_bits:
        raise ConfigError(f"model.low_bits={low_bits} is not possible: below model.high_bits ({high_bits})")
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise ConfigError(
            f"model.middle_bits={middle_bits} is not possible: strictly between {high_bits} and {low_bits}, falling"
        )
