"""How a cell's schedules come about: a function for each kind of scheduler.

A scheduler that decides a sequence at a time is ``kind: policy``, and needs nothing here: its module is in
``pmpd/schedulers/policies``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.learning import labels, network
from pipelines.quantised import sensitivity
from pipelines.sources import policy_input
from pmpd.artifacts import Input, Node
from pmpd.config import (
    UNIFORM,
    Config,
    Level,
    SchedulerKind,
    check_dense_sparse,
    given_steps,
    grid,
    max_new_tokens,
)
from pmpd.records import FP16_BITS, Schedule, class_schedules, pattern_schedule, schedule_family
from pmpd.schedulers import Setting, build, check_options, trained_for
from pmpd.stages.decide import DECIDE, DecideConfig
from pmpd.stages.dense_sparse import DENSE_SPARSE, DenseSparseConfig
from pmpd.stages.fit_static import FIT_STATIC, FitStaticConfig
from pmpd.stages.oracle import ORACLE, OracleConfig

if TYPE_CHECKING:
    from pipelines.plan import Planner

SEARCHED = (SchedulerKind.static, SchedulerKind.policy, SchedulerKind.oracle)
"""Kinds that choose among candidates, whose quality is then worth a curve."""


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

    def bits(self, level: Level) -> int:
        """The precision at a place."""
        return {Level.fp16: FP16_BITS, Level.high: self.high, Level.low: self.low}[level]


@dataclass(frozen=True)
class Choosing:
    """What a choice is made from.

    Attributes:
        candidates: the schedules that were rolled out, cheapest first.
        rollouts: their completions of ``prompts``.
    """

    planner: Planner
    config: Config
    precisions: Precisions
    candidates: list[Schedule]
    prompts: Node
    rollouts: Input

    @property
    def prefill_bits(self) -> int:
        return prefill_bits(self.config, self.precisions)


@dataclass(frozen=True)
class Choice:
    """How a cell's schedules come about: one that is given, or inputs of the evaluation that say."""

    schedule: Schedule | None = None
    inputs: dict[str, Input] = field(default_factory=dict)
    fit: Node | None = None
    training: Node | None = None
    dense_sparse: Node | None = None


def prefill_bits(config: Config, precisions: Precisions) -> int:
    """Precision of the cell's prefill."""
    scheduler = config.scheduler
    if scheduler.bits is not None:
        return scheduler.bits
    if scheduler.kind in UNIFORM:
        return precisions.bits(Level(scheduler.kind.value))
    if scheduler.kind is SchedulerKind.dense_sparse:
        return precisions.low
    return precisions.bits(scheduler.prefill) if scheduler.prefill_bits is None else scheduler.prefill_bits


def candidates(config: Config, precisions: Precisions) -> list[Schedule]:
    """The schedules that a cell's scheduler chooses among, cheapest first; its baselines' cells roll out the same.

    A scheduler that chooses among none rolls out what a static one would, so that a sweep shares rollouts.
    """
    scheduler = config.scheduler.target or config.scheduler
    config = dataclasses.replace(config, scheduler=scheduler)
    prefill = prefill_bits(config, precisions) if scheduler.kind in SEARCHED else precisions.high
    if scheduler.kind in (SchedulerKind.policy, SchedulerKind.oracle):
        return class_schedules(prefill, precisions.levels, max_new_tokens(config), scheduler.grid_parts)
    return schedule_family(prefill, precisions.levels, grid(config))


def choose(of: Choosing) -> Choice:
    """What the cell's scheduler does."""
    return CHOICES[of.config.scheduler.kind](of)


def _uniform(of: Choosing) -> Choice:
    schedule = Schedule.uniform(of.prefill_bits)
    if schedule.prefill_bits in (FP16_BITS, of.precisions.high):
        return Choice(schedule)  # rolled out with the candidates
    tokens = of.planner.max_new_tokens
    return Choice(schedule, {"rollouts_low": of.planner.rollout(of.prompts, [schedule], tokens)})


def _static(of: Choosing) -> Choice:
    planner, config, task = of.planner, of.config, of.config.task
    steps = given_steps(config)
    if steps is not None:
        return Choice(Schedule(of.prefill_bits, of.precisions.levels, steps))
    assert task.validation_split is not None
    validation = planner.prompts(task.validation_split, config.budget.validation_samples)
    fit = FIT_STATIC.node(
        FitStaticConfig(
            schedules=[s.name for s in of.candidates],
            max_new_tokens=planner.max_new_tokens,
            high=Schedule.uniform(of.precisions.high).name,
            metric=task.metrics[0].value,
            tolerance=config.scheduler.tolerance,
            encoder=planner.encoder_name,
            device=planner.runtime.device,
            resamples=config.budget.bootstrap_resamples,
            seed=config.seed,
        ),
        prompts=validation,
        **planner.encoder,
        **planner.rollouts(validation, of.candidates, of.precisions, planner.max_new_tokens),
    )
    return Choice(inputs={"choice": fit}, fit=fit)


def _pattern(of: Choosing) -> Choice:
    bits = [of.precisions.bits(level) for level in of.config.scheduler.pattern]
    tokens = of.planner.max_new_tokens
    schedule = pattern_schedule(of.prefill_bits, bits, tokens)
    canonical = schedule.canonical(tokens)
    if canonical in {s.canonical(tokens) for s in of.candidates}:
        return Choice(schedule)
    return Choice(schedule, {"rollouts_own": of.planner.rollout(of.prompts, [canonical], tokens)})


def _oracle(of: Choosing) -> Choice:
    planner, scheduler = of.planner, of.config.scheduler
    oracle = ORACLE.node(
        OracleConfig(
            prefill_bits=of.prefill_bits,
            levels=list(of.precisions.levels),
            grid_parts=scheduler.grid_parts,
            max_new_tokens=planner.max_new_tokens,
            hindsight=scheduler.hindsight.value,
            metric=of.config.task.metrics[0].value,
            encoder=planner.encoder_name,
            device=planner.runtime.device,
        ),
        prompts=of.prompts,
        **planner.encoder,
        **planner.rollouts(of.prompts, of.candidates, of.precisions, planner.max_new_tokens),
    )
    return Choice(inputs={"decisions": oracle})


def _policy(of: Choosing) -> Choice:
    planner, scheduler = of.planner, of.config.scheduler
    assert scheduler.policy is not None
    check_options(scheduler.policy, scheduler.options)
    needs = trained_for(scheduler.policy)
    if not needs:  # refuses a value now that would be refused after hours
        setting = Setting(of.prefill_bits, of.precisions.levels, tuple(of.candidates), of.config.seed)
        build(scheduler.policy, setting, scheduler.options)
    recipes = {"labels": labels, "network": network}
    trained = {name: recipes[name](planner, of.config, of.precisions.levels, of.prefill_bits) for name in needs}
    decisions = DECIDE.node(
        DecideConfig(
            policy=scheduler.policy,
            options=dict(scheduler.options),
            prefill_bits=of.prefill_bits,
            levels=list(of.precisions.levels),
            grid_parts=scheduler.grid_parts,
            max_new_tokens=planner.max_new_tokens,
            template=of.config.model.prompt,
            batch_size=of.config.budget.batch_size,
            seed=of.config.seed,
            runtime=planner.runtime,
        ),
        model=planner.model,
        nested=planner.nested,
        prompts=of.prompts,
        rollouts=of.rollouts,
        **policy_input(scheduler.policy, planner.digests),
        **trained,
    )
    return Choice(inputs={"decisions": decisions}, training=trained.get("network"))


def _dense_sparse(of: Choosing) -> Choice:
    planner, scheduler, quantizer = of.planner, of.config.scheduler, of.config.quantizer
    assert scheduler.target is not None
    check_dense_sparse(of.config)
    matched = choose(dataclasses.replace(of, config=dataclasses.replace(of.config, scheduler=scheduler.target)))
    model = DENSE_SPARSE.node(
        DenseSparseConfig(
            of.precisions.low,
            quantizer.group_size,
            quantizer.solver.value,
            scheduler.outliers.value,
            scheduler.accounting.value,
            matched.schedule.name if matched.schedule else None,
            planner.max_new_tokens,
            of.config.model.trust_remote_code,
        ),
        model=planner.model,
        sensitivity=sensitivity(planner.model, planner.calibration, planner.runtime),
        rollouts=of.rollouts,
        **matched.inputs,
    )
    low = Schedule.uniform(of.precisions.low)
    own = planner.rollout(of.prompts, [low], planner.max_new_tokens, model)
    return Choice(low, {"rollouts_own": own}, dense_sparse=model)


CHOICES: dict[SchedulerKind, Callable[[Choosing], Choice]] = {
    SchedulerKind.fp16: _uniform,
    SchedulerKind.high: _uniform,
    SchedulerKind.low: _uniform,
    SchedulerKind.uniform: _uniform,
    SchedulerKind.static: _static,
    SchedulerKind.pattern: _pattern,
    SchedulerKind.oracle: _oracle,
    SchedulerKind.policy: _policy,
    SchedulerKind.dense_sparse: _dense_sparse,
}
