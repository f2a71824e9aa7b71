"""The fields of a cell's configuration: types and defaults. What they mean to a user stands in ``conf/``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING


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
    """How a cell's schedules come about; ``pipelines/choices.py`` has a function for each."""

    fp16 = "fp16"
    high = "high"
    low = "low"
    uniform = "uniform"
    static = "static"
    pattern = "pattern"
    oracle = "oracle"
    policy = "policy"
    dense_sparse = "dense_sparse"


class Level(Enum):
    """A precision by its place in the cell's, so that one file serves every model."""

    fp16 = "fp16"
    high = "high"
    low = "low"


class Hindsight(Enum):
    """What the oracle takes: the best class of a sample, or the cheapest that is no worse than uniform high."""

    best = "best"
    lossless = "lossless"


class OutlierChoice(Enum):
    """Which weights dense-and-sparse keeps in float16."""

    sensitivity = "sensitivity"
    magnitude = "magnitude"


class Accounting(Enum):
    """What an outlier is charged: what is stored, or as in the paper 16 bits, its index free."""

    stored = "stored"
    nominal = "nominal"


class Feature(Enum):
    """What a learned scheduler looks at after prefill."""

    kv = "kv"
    last_mean = "last_mean"
    all_statistics = "all_statistics"


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


class LauncherKind(Enum):
    serial = "serial"
    local = "local"
    slurm = "slurm"
    ray = "ray"


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
    hub_path: Optional[str] = MISSING
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
    bits: Optional[int] = None
    prefill: Level = Level.high
    prefill_bits: Optional[int] = None
    grid: Optional[list[int]] = None
    grid_parts: int = 3
    switch_step: Optional[int] = None
    switch_steps: Optional[list[int]] = None
    tolerance: float = 0.0
    pattern: list[Level] = field(default_factory=list)
    hindsight: Hindsight = Hindsight.best
    policy: Optional[str] = None
    options: dict[str, Any] = field(default_factory=dict)
    features: list[Feature] = field(default_factory=lambda: [Feature.kv])
    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    train_batch: int = 32
    holdout: float = 0.1
    target: Optional[SchedulerConfig] = None
    outliers: OutlierChoice = OutlierChoice.sensitivity
    accounting: Accounting = Accounting.stored


@dataclass
class QuantizerConfig:
    name: str = MISSING
    seed_bits: int = 2
    parent_bits: int = 8
    group_size: Optional[int] = None
    kind: QuantizerKind = MISSING
    solver: Solver = Solver.exact
    sensitivity_power: float = 1.0
    focus_bits: int = 4
    high_share: float = 0.25
    damping: float = 0.01
    refits: int = 0
    sweeps: int = 2
    outlier_share: float = 0.0
    tuning_steps: int = 0
    tuning_bits: int = 4
    tuning_rate: float = 0.003


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
class NeedsConfig:
    """What a job of a stage asks for; GPUs only where the stage's device is cuda."""

    cpus: int = 1
    gpus: int = 0
    memory_gib: float = 4.0
    minutes: int = 60


@dataclass
class LauncherConfig:
    """Where stages run: a stage in ``stages`` as jobs, another in the sweep's own process."""

    name: str = MISSING
    kind: LauncherKind = MISSING
    stages: dict[str, NeedsConfig] = field(default_factory=dict)
    max_cpus: Optional[int] = None
    max_memory_gib: Optional[float] = None
    retries: int = 1
    folder: str = "outputs/jobs"
    partition: Optional[str] = None
    options: dict[str, str] = field(default_factory=dict)
    address: Optional[str] = None


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
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    report: ReportKind = ReportKind.cells
    seed: int = 0
    device: Device = Device.auto
    threads: Optional[int] = None
    store: str = "outputs/store"
    run_name: str = "run"
