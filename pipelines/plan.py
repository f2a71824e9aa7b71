"""From a cell's configuration to its graph of recipes, without running anything.

The only thing that a key may wait for is the precision search: ``model.high_bits: null`` is read from the
search's result before anything after it is keyed, so that ``null`` and an explicit 3 share every artifact.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipelines.machines import Measured, Measures, check_hardware, measures
from pipelines.sources import device_type, encoder_input, task_input, text_input
from pmpd.artifacts import Input, Node, Store
from pmpd.config import (
    Config,
    ConfigError,
    Metric,
    Overlong,
    QuantizerKind,
    SchedulerKind,
    check_precisions,
    grid,
    max_new_tokens,
)
from pmpd.models import resolve
from pmpd.records import FP16_BITS, Schedule, class_schedules, schedule_family
from pmpd.stages import RuntimeConfig, read_summary
from pmpd.stages import inputs as inputs_
from pmpd.stages.calibration import MOMENTS, SENSITIVITY, MomentsConfig, SensitivityConfig
from pmpd.stages.evaluate import EVALUATE, EvaluateConfig
from pmpd.stages.fit_static import FIT_STATIC, FitStaticConfig
from pmpd.stages.inputs import DATA, PROMPTS, SEEDS, TEXTS, WEIGHTS, model_input
from pmpd.stages.learned import (
    DECIDE,
    FEATURES,
    TRAIN_LEARNED,
    DecideConfig,
    FeaturesConfig,
    TrainLearnedConfig,
)
from pmpd.stages.quantization import QUANTIZE, QUANTIZE_JOINT, QuantizeConfig, QuantizeJointConfig
from pmpd.stages.rollouts import ROLLOUTS, RolloutsConfig
from pmpd.stages.search import SEARCH, SearchConfig
from pmpd.stages.tuning import TUNE, TuneConfig

BASELINES = (SchedulerKind.fp16, SchedulerKind.high)
"""Cells that every single run shows beside its own: they cost scoring only."""


TUNING_BATCH = 4
"""Calibration windows of a tuning step."""

UNIFORM = (SchedulerKind.fp16, SchedulerKind.high, SchedulerKind.low)


@dataclass(frozen=True)
class Precisions:
    """The pair (or more) of a cell, and where it came from."""

    levels: tuple[int, ...]
    source: str

    @property
    def high(self) -> int:
        return self.levels[0]

    @property
    def low(self) -> int:
        return self.levels[-1]


@dataclass(frozen=True)
class Cell:
    """The recipes of one cell.

    Attributes:
        gain: what the schedule gains on the cell's hardware.
        linears: times of the linear layers alone, on a GPU.
    """

    config: Config
    precisions: Precisions
    prefill_bits: int
    search: Node
    evaluation: Node
    gain: Node
    latency: Node
    linears: Node | None
    fit: Node | None
    training: Node | None

    @property
    def targets(self) -> list[Node]:
        """In the order in which they are built: cheap checks of the inputs first."""
        wanted = [self.search, self.evaluation, self.latency, *([self.linears] if self.linears else []), self.gain]
        nodes = {n.key: n for target in wanted for n in target.ancestors()}
        first = [
            n for n in nodes.values() if n.stage in (WEIGHTS.name, DATA.name, PROMPTS.name, TEXTS.name, SEEDS.name)
        ]
        return [*first, *wanted]


@dataclass(frozen=True)
class Choice:
    """How a cell's schedules come about: one that is given, or inputs of the evaluation that say."""

    schedule: Schedule | None = None
    inputs: dict[str, Input] = dataclasses.field(default_factory=dict)
    fit: Node | None = None
    training: Node | None = None


class MissingSearchError(ConfigError):
    """``model.high_bits`` is null and the search has not run."""


class Planner:
    """Builds the recipes of one configuration; nodes that two schedulers share are equal by key.

    Raises:
        ConfigError, DataError, ModelError: an input that is not there.
    """

    def __init__(self, config: Config, store: Store, *, reading: bool = False) -> None:
        """
        Args:
            reading: nothing will be built, so times that another machine recorded will do.
        """
        self.config = config
        self.store = store
        self.reading = reading
        check_hardware(config.hardware)  # refused here, before anything runs
        self.max_new_tokens = max_new_tokens(config)
        self.source = resolve(config.model.path, config.model.revision)
        self.digests = store.root / "digests.json"
        self.model = model_input(self.source, self.digests)
        self.encoder: dict[str, Input] = {}
        self.encoder_name = ""
        if Metric.bertscore in config.task.metrics:
            self.encoder_name = config.budget.bertscore_encoder
            self.encoder["encoder"] = encoder_input(self.encoder_name, self.digests)
        budget, quantizer, trust = config.budget, config.quantizer, config.model.trust_remote_code
        self.texts_data = text_input(config, self.digests)
        calibration = TEXTS.node(
            inputs_.TextsConfig("calibration", budget.calibration_windows, budget.calibration_window_tokens, trust),
            model=self.model,
            data=self.texts_data,
        )
        self.perplexity_texts = TEXTS.node(
            inputs_.TextsConfig("perplexity", budget.search_windows, budget.search_window_tokens, trust),
            model=self.model,
            data=self.texts_data,
        )
        self.runtime = RuntimeConfig(config.model.dtype.value, device_type(config), config.model.trust_remote_code)
        self.nested = self._tuned(self._nested(calibration), calibration)
        self.search = SEARCH.node(
            SearchConfig(
                seed_bits=quantizer.seed_bits,
                parent_bits=quantizer.parent_bits,
                tolerance=budget.search_tolerance,
                runtime=self.runtime,
            ),
            model=self.model,
            nested=self.nested,
            texts=self.perplexity_texts,
        )

    def _nested(self, calibration: Node) -> Node:
        """The quantised model, and what its quantiser weights errors by."""
        quantizer, trust = self.config.quantizer, self.config.model.trust_remote_code
        differentiable = self.runtime.differentiable()
        common = (quantizer.seed_bits, quantizer.parent_bits, quantizer.group_size)
        match quantizer.kind:
            case QuantizerKind.anyprec:
                sensitivity = SENSITIVITY.node(SensitivityConfig(differentiable), model=self.model, texts=calibration)
                return QUANTIZE.node(
                    QuantizeConfig(*common, quantizer.solver.value, trust), model=self.model, sensitivity=sensitivity
                )
            case QuantizerKind.joint:
                moments = MOMENTS.node(MomentsConfig(differentiable), model=self.model, texts=calibration)
                return QUANTIZE_JOINT.node(
                    QuantizeJointConfig(
                        *common,
                        focus_bits=quantizer.focus_bits,
                        high_share=quantizer.high_share,
                        damping=quantizer.damping,
                        refits=quantizer.refits,
                        sweeps=quantizer.sweeps,
                        outlier_share=quantizer.outlier_share,
                        device=self.runtime.device,
                        trust_remote_code=trust,
                    ),
                    model=self.model,
                    moments=moments,
                )

    def _tuned(self, nested: Node, calibration: Node) -> Node:
        """``nested`` with its low precisions' tables tuned, if that is asked for."""
        quantizer = self.config.quantizer
        if not quantizer.tuning_steps:
            return nested
        return TUNE.node(
            TuneConfig(
                bits=list(range(quantizer.seed_bits, min(quantizer.tuning_bits, quantizer.parent_bits) + 1)),
                steps=quantizer.tuning_steps,
                rate=quantizer.tuning_rate,
                batch_size=TUNING_BATCH,
                runtime=self.runtime.differentiable(),
            ),
            model=self.model,
            nested=nested,
            texts=calibration,
        )

    def precisions(self) -> Precisions:
        """The cell's precisions: given, or what the search found.

        Raises:
            MissingSearchError: they hang on a search that has not run.
            ConfigError: the search found no lossless precision, or no room below it.
        """
        model, nested_low = self.config.model, self.config.quantizer.seed_bits
        high, source = model.high_bits, "given"
        if high is None:
            if self.store.status(self.search) != "cached":
                raise MissingSearchError("model.high_bits is null and the precision search has not run yet")
            metrics = read_summary(self.store.verify(self.search))["metrics"]
            high, source = metrics["lowest_lossless_bits"], "search"
            if high is None:
                raise ConfigError(
                    f"model.high_bits=null is not possible: no precision up to {self.config.quantizer.parent_bits} "
                    f"bits is within budget.search_tolerance={self.config.budget.search_tolerance} of fp16; "
                    "raise the tolerance or give model.high_bits"
                )
        low = model.low_bits if model.low_bits is not None else high - 1
        if low < nested_low:
            raise ConfigError(
                f"model.low_bits={low} (one below high_bits={high}, from {source}) is not possible: "
                f"quantizer.seed_bits={nested_low} is the lowest"
            )
        check_precisions(high, low, model.middle_bits)
        return Precisions((high, *model.middle_bits, low), source)

    def cell(self, scheduler: SchedulerKind | None = None) -> Cell:
        """The recipes of this cell, or of the same cell under another, uniform scheduler, which share rollouts."""
        config, budget, task = self.config, self.config.budget, self.config.task
        if scheduler is not None and scheduler is not config.scheduler.kind:
            config = replace_scheduler(config, scheduler)
        kind = config.scheduler.kind
        precisions = self.precisions()
        candidates = self._candidates(precisions)
        prompts = self._prompts(task.test_split, budget.test_samples)
        rollouts = self._rollouts(prompts, candidates, precisions, self.max_new_tokens)
        if kind is SchedulerKind.low:
            rollouts["rollouts_low"] = self._rollout(prompts, [_uniform(kind, precisions)], self.max_new_tokens)
        choice = self._choice(config, precisions, candidates, prompts, rollouts["rollouts"])
        evaluation = EVALUATE.node(
            EvaluateConfig(
                scheduler=kind.value,
                schedule=choice.schedule.name if choice.schedule else None,
                high=Schedule.uniform(precisions.high).name,
                curve=[s.name for s in candidates] if kind in (SchedulerKind.static, SchedulerKind.learned) else [],
                metrics=[m.value for m in task.metrics],
                max_new_tokens=self.max_new_tokens,
                encoder=self.encoder_name,
                device=self.runtime.device,
                resamples=budget.bootstrap_resamples,
                seed=config.seed,
            ),
            prompts=prompts,
            **rollouts,
            **choice.inputs,
            **self.encoder,
        )
        gains = self._measures(evaluation, precisions)
        return Cell(
            config=config,
            precisions=precisions,
            prefill_bits=_uniform(kind, precisions).prefill_bits if kind in UNIFORM else self._prefill_bits(precisions),
            search=self.search,
            evaluation=evaluation,
            gain=gains.gain,
            latency=gains.latency,
            linears=gains.linears,
            fit=choice.fit,
            training=choice.training,
        )

    def _prefill_bits(self, precisions: Precisions) -> int:
        given = self.config.scheduler.prefill_bits
        return precisions.high if given is None else given

    def _candidates(self, precisions: Precisions) -> list[Schedule]:
        """The schedules that this cell's scheduler chooses among; the baselines' cells roll out the same."""
        prefill = self._prefill_bits(precisions)
        if self.config.scheduler.kind is SchedulerKind.learned:
            return class_schedules(prefill, precisions.levels, self.max_new_tokens)
        return schedule_family(prefill, precisions.levels, grid(self.config))

    def _choice(
        self, config: Config, precisions: Precisions, candidates: list[Schedule], prompts: Node, rollouts: Input
    ) -> Choice:
        kind, step = config.scheduler.kind, config.scheduler.switch_step
        if kind in UNIFORM:
            return Choice(_uniform(kind, precisions))
        if kind is SchedulerKind.static and step is not None:
            return Choice(Schedule(self._prefill_bits(precisions), precisions.levels, (step,)))
        if kind is SchedulerKind.static:
            fit = self._fit(precisions, candidates)
            return Choice(inputs={"choice": fit}, fit=fit)
        training, decisions = self._learned(precisions, prompts, rollouts)
        return Choice(inputs={"decisions": decisions}, training=training)

    def _fit(self, precisions: Precisions, candidates: list[Schedule]) -> Node:
        config, task = self.config, self.config.task
        assert task.validation_split is not None
        validation = self._prompts(task.validation_split, config.budget.validation_samples)
        return FIT_STATIC.node(
            FitStaticConfig(
                schedules=[s.name for s in candidates],
                max_new_tokens=self.max_new_tokens,
                high=Schedule.uniform(precisions.high).name,
                metric=task.metrics[0].value,
                tolerance=config.scheduler.tolerance,
                encoder=self.encoder_name,
                device=self.runtime.device,
                resamples=config.budget.bootstrap_resamples,
                seed=config.seed,
            ),
            prompts=validation,
            **self.encoder,
            **self._rollouts(validation, candidates, precisions, self.max_new_tokens),
        )

    def _measures(self, evaluation: Node, precisions: Precisions) -> Measures:
        return measures(
            self.config,
            self.store,
            Measured(self.model, self.nested, evaluation, precisions.levels, self.runtime),
            reading=self.reading,
        )

    def _learned(self, precisions: Precisions, prompts: Node, rollouts: Input) -> tuple[Node, Node]:
        """Training, and its decisions on the task's prompts."""
        config, budget = self.config, self.config.budget
        scheduler, prefill = config.scheduler, self._prefill_bits(precisions)
        seeds = SEEDS.node(
            inputs_.SeedsConfig(
                budget.seed_prompts,
                budget.seed_max_prompt_tokens,
                budget.seed_new_tokens,
                config.seed,
                config.model.trust_remote_code,
            ),
            model=self.model,
            data=self.texts_data,
        )
        features = FEATURES.node(
            FeaturesConfig(prefill, budget.batch_size, self.runtime),
            model=self.model,
            nested=self.nested,
            prompts=seeds,
        )
        classes = class_schedules(prefill, precisions.levels, budget.seed_new_tokens)
        training = TRAIN_LEARNED.node(
            TrainLearnedConfig(
                prefill_bits=prefill,
                levels=list(precisions.levels),
                max_new_tokens=budget.seed_new_tokens,
                epochs=scheduler.epochs,
                learning_rate=scheduler.learning_rate,
                weight_decay=scheduler.weight_decay,
                dropout=scheduler.dropout,
                train_batch=scheduler.train_batch,
                holdout=scheduler.holdout,
                seed=config.seed,
            ),
            prompts=seeds,
            features=features,
            **self._rollouts(seeds, classes, precisions, budget.seed_new_tokens),
        )
        decisions = DECIDE.node(
            DecideConfig(
                prefill_bits=prefill,
                levels=list(precisions.levels),
                max_new_tokens=self.max_new_tokens,
                template=config.model.prompt,
                batch_size=budget.batch_size,
                runtime=self.runtime,
            ),
            model=self.model,
            nested=self.nested,
            prompts=prompts,
            scheduler=training,
            rollouts=rollouts,
        )
        return training, decisions

    def _rollouts(self, prompts: Node, pmpd: list[Schedule], precisions: Precisions, tokens: int) -> dict[str, Input]:
        """fp16 and the candidates (with uniform high, which most often is one of them), an artifact each."""
        canonical = dict.fromkeys(s.canonical(tokens) for s in pmpd)
        candidates = list(canonical | {Schedule.uniform(precisions.high): None})
        fp16 = [Schedule.uniform(FP16_BITS)]
        return {
            "rollouts": self._rollout(prompts, candidates, tokens),
            "rollouts_fp16": self._rollout(prompts, fp16, tokens),
        }

    def _rollout(self, prompts: Node, schedules: list[Schedule], tokens: int) -> Node:
        quantised = any(s.prefill_bits != FP16_BITS or s.levels != (FP16_BITS,) for s in schedules)
        return ROLLOUTS.node(
            RolloutsConfig(
                schedules=sorted(s.name for s in schedules),
                max_new_tokens=tokens,
                template=self.config.model.prompt,
                batch_size=self.config.budget.batch_size,
                runtime=self.runtime,
            ),
            model=self.model,
            prompts=prompts,
            **({"nested": self.nested} if quantised else {}),
        )

    def _prompts(self, split: str, limit: int | None) -> Node:
        config, task = self.config, self.config.task
        return PROMPTS.node(
            inputs_.PromptsConfig(
                dataset=task.dataset,
                split=split,
                instruction=task.prompt,
                template=self.config.model.prompt,
                limit=limit,
                min_reference_words=task.min_reference_words,
                max_new_tokens=self.max_new_tokens,
                truncate=task.overlong is Overlong.truncate,
                trust_remote_code=config.model.trust_remote_code,
            ),
            model=self.model,
            data=task_input(config, split, self.digests),
        )


def _uniform(kind: SchedulerKind, precisions: Precisions) -> Schedule:
    bits = {SchedulerKind.fp16: FP16_BITS, SchedulerKind.high: precisions.high, SchedulerKind.low: precisions.low}
    return Schedule.uniform(bits[kind])


def replace_scheduler(config: Config, kind: SchedulerKind) -> Config:
    """The same cell under a uniform scheduler."""
    scheduler = dataclasses.replace(
        config.scheduler, name=kind.value, kind=kind, prefill_bits=None, grid=None, switch_step=None
    )
    return dataclasses.replace(config, scheduler=scheduler)
