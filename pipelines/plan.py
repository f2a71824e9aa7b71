"""From a cell's configuration to its graph of recipes, without running anything.

The only thing that a key may wait for is the precision search: ``model.high_bits: null`` is read from the
search's result before anything after it is keyed, so that ``null`` and an explicit 3 share every artifact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.choices import SEARCHED, Choosing, Precisions, candidates, choose, prefill_bits
from pipelines.machines import Measured, Measures, check_hardware, measures
from pipelines.quantised import nested_model
from pipelines.sources import device_type, encoder_input, rules_input, task_input, text_input
from pmpd.artifacts import DamagedArtifactError, Input, Node, Store
from pmpd.config import (
    Config,
    ConfigError,
    Level,
    Metric,
    Overlong,
    SchedulerConfig,
    SchedulerKind,
    check_precisions,
    max_new_tokens,
)
from pmpd.models import resolve
from pmpd.records import FP16_BITS, Schedule
from pmpd.stages import RuntimeConfig, read_summary
from pmpd.stages import inputs as inputs_
from pmpd.stages.evaluate import EVALUATE, EvaluateConfig
from pmpd.stages.inputs import DATA, PROMPTS, SEEDS, TEXTS, WEIGHTS, model_input
from pmpd.stages.rollouts import ROLLOUTS, RolloutsConfig
from pmpd.stages.search import SEARCH, SearchConfig

BASELINES = (SchedulerKind.fp16, SchedulerKind.high)
"""Cells that every single run shows beside its own: they cost scoring only."""

INPUT_STAGES = (WEIGHTS.name, DATA.name, PROMPTS.name, TEXTS.name, SEEDS.name)
"""Built first, so that bad input is refused while nothing is lost."""


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
    dense_sparse: Node | None

    @property
    def read(self) -> list[Node]:
        """What a report reads, in the order in which it is built."""
        chosen = [self.fit, self.training, self.dense_sparse]
        nodes = [self.search, *chosen, self.evaluation, self.latency, self.linears, self.gain]
        return [node for node in nodes if node is not None]

    @property
    def targets(self) -> list[Node]:
        """What a run builds: cheap checks of the inputs first."""
        nodes = {n.key: n for target in self.read for n in target.ancestors()}
        return [*(n for n in nodes.values() if n.stage in INPUT_STAGES), *self.read]


class MissingSearchError(ConfigError):
    """``model.high_bits`` is null and the search has not run, or its result is damaged."""


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
        self.calibration = TEXTS.node(
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
        self.nested = nested_model(quantizer, self.model, self.calibration, self.runtime)
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

    def precisions(self) -> Precisions:
        """The cell's precisions: given, or what the search found.

        Raises:
            MissingSearchError: they hang on a search that has not run, or whose result is damaged.
            ConfigError: the search found no lossless precision, or no room below it.
        """
        model, nested_low = self.config.model, self.config.quantizer.seed_bits
        high, source = model.high_bits, "given"
        if high is None:
            if self.store.status(self.search) != "cached":
                raise MissingSearchError("model.high_bits is null and the precision search has not run yet")
            try:
                metrics = read_summary(self.store.verify(self.search, ".json"))["metrics"]
            except DamagedArtifactError as error:  # what builds the search replaces it
                raise MissingSearchError(
                    f"model.high_bits is null and the precision search is damaged: {error}"
                ) from error
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

    def cell(self, scheduler: SchedulerKind | SchedulerConfig | None = None) -> Cell:
        """The recipes of this cell, or of the same cell under another scheduler, which share rollouts."""
        config, budget, task = self.config, self.config.budget, self.config.task
        if isinstance(scheduler, SchedulerConfig):
            config = dataclasses.replace(config, scheduler=scheduler)
        elif scheduler is not None and scheduler is not config.scheduler.kind:
            config = replace_scheduler(config, scheduler)
        kind = config.scheduler.kind
        precisions = self.precisions()
        options = candidates(self.config, precisions)  # of this cell's own scheduler, whichever is asked for
        prompts = self.prompts(task.test_split, budget.test_samples)
        rollouts = self.rollouts(prompts, options, precisions, self.max_new_tokens)
        choice = choose(Choosing(self, config, precisions, options, prompts, rollouts["rollouts"]))
        outliers = self.outliers(choice.dense_sparse)
        evaluation = EVALUATE.node(
            EvaluateConfig(
                scheduler=config.scheduler.policy or kind.value,
                schedule=choice.schedule.name if choice.schedule else None,
                high=Schedule.uniform(precisions.high).name,
                curve=[s.name for s in options] if kind in SEARCHED else [],
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
            **outliers,
            **self.encoder,
        )
        gains = self._measures(evaluation, precisions, choice.dense_sparse)
        return Cell(
            config=config,
            precisions=precisions,
            prefill_bits=prefill_bits(config, precisions),
            search=self.search,
            evaluation=evaluation,
            gain=gains.gain,
            latency=gains.latency,
            linears=gains.linears,
            fit=choice.fit,
            training=choice.training,
            dense_sparse=choice.dense_sparse,
        )

    def _measures(self, evaluation: Node, precisions: Precisions, dense_sparse: Node | None) -> Measures:
        return measures(
            self.config,
            self.store,
            Measured(
                self.model,
                self.nested,
                evaluation,
                precisions.levels,
                self.runtime,
                dense_sparse,
                self.outliers(dense_sparse),
            ),
            reading=self.reading,
        )

    def outliers(self, dense_sparse: Node | None = None) -> dict[str, Node]:
        """The model that a cell decodes if it has outliers, as the input that says the bits they add to a step."""
        if dense_sparse is not None:
            return {"outliers": dense_sparse}
        return {"outliers": self.nested} if self.config.quantizer.outlier_share else {}

    def rollouts(
        self, prompts: Node, options: Sequence[Schedule], precisions: Precisions, tokens: int
    ) -> dict[str, Input]:
        """fp16, the candidates and uniform high, an artifact for what shares a prefill.

        Uniform high is most often one of the candidates; after another prefill it shares nothing with them, and is an
        artifact that every such prefill shares.
        """
        canonical = dict.fromkeys(s.canonical(tokens) for s in options)
        high = Schedule.uniform(precisions.high)
        apart = all(s.prefill_bits != high.prefill_bits for s in canonical)
        return {
            "rollouts": self.rollout(prompts, list(canonical if apart else canonical | {high: None}), tokens),
            **({"rollouts_high": self.rollout(prompts, [high], tokens)} if apart else {}),
            "rollouts_fp16": self.rollout(prompts, [Schedule.uniform(FP16_BITS)], tokens),
        }

    def rollout(self, prompts: Node, schedules: Sequence[Schedule], tokens: int, nested: Node | None = None) -> Node:
        """Completions of ``prompts`` under ``schedules``, up to ``tokens`` tokens, of another nested model if given."""
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
            **({"nested": nested or self.nested} if quantised else {}),
        )

    def prompts(self, split: str, limit: int | None) -> Node:
        """The first ``limit`` samples of a split of the task, as prompts of the model."""
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
            **rules_input(task.dataset, self.digests),
        )


def replace_scheduler(config: Config, kind: SchedulerKind) -> Config:
    """The same cell under a uniform scheduler."""
    scheduler = dataclasses.replace(
        config.scheduler,
        name=kind.value,
        kind=kind,
        bits=None,
        prefill=Level.high,
        prefill_bits=None,
        grid=None,
        switch_step=None,
        switch_steps=None,
        pattern=[],
        target=None,
        policy=None,
        options={},
    )
    return dataclasses.replace(config, scheduler=scheduler)
