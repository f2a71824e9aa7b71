"""The recipes of what is learned from plain text: labels of seed prompts, and a network trained on them.

No task takes part: a model's tasks share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmpd.artifacts import Node
from pmpd.config import Config
from pmpd.records import FP16_BITS, Schedule, class_schedules
from pmpd.stages.inputs import SEEDS, SeedsConfig
from pmpd.stages.labels import LABELS, LabelsConfig
from pmpd.stages.learned import FEATURES, TRAIN_LEARNED, FeaturesConfig, TrainLearnedConfig

if TYPE_CHECKING:
    from pipelines.plan import Planner


def seeds(planner: Planner, config: Config) -> Node:
    """Plain texts cut at a random length: the prompts that labels are of."""
    budget = config.budget
    return SEEDS.node(
        SeedsConfig(
            budget.seed_prompts,
            budget.seed_max_prompt_tokens,
            budget.seed_new_tokens,
            config.seed,
            config.model.trust_remote_code,
        ),
        model=planner.model,
        data=planner.texts_data,
    )


def labels(planner: Planner, config: Config, levels: Sequence[int], prefill_bits: int) -> Node:
    """The class that each seed prompt should have had, from its rollouts."""
    tokens, parts = config.budget.seed_new_tokens, config.scheduler.grid_parts
    prompts = seeds(planner, config)
    classes = class_schedules(prefill_bits, levels, tokens, parts)
    high = Schedule.uniform(levels[0])
    canonical = list(dict.fromkeys(s.canonical(tokens) for s in [*classes, high]))
    return LABELS.node(
        LabelsConfig(prefill_bits, list(levels), parts, tokens),
        prompts=prompts,
        rollouts=planner.rollout(prompts, canonical, tokens),
        rollouts_fp16=planner.rollout(prompts, [Schedule.uniform(FP16_BITS)], tokens),
    )


def network(planner: Planner, config: Config, levels: Sequence[int], prefill_bits: int) -> Node:
    """The learned scheduler's network, trained on the labels and on features of the same prompts."""
    scheduler, budget = config.scheduler, config.budget
    features = FEATURES.node(
        FeaturesConfig(prefill_bits, budget.batch_size, planner.runtime),
        model=planner.model,
        nested=planner.nested,
        prompts=seeds(planner, config),
    )
    return TRAIN_LEARNED.node(
        TrainLearnedConfig(
            features=[f.value for f in scheduler.features],
            prefill_bits=prefill_bits,
            levels=list(levels),
            grid_parts=scheduler.grid_parts,
            max_new_tokens=budget.seed_new_tokens,
            epochs=scheduler.epochs,
            learning_rate=scheduler.learning_rate,
            weight_decay=scheduler.weight_decay,
            dropout=scheduler.dropout,
            train_batch=scheduler.train_batch,
            holdout=scheduler.holdout,
            seed=config.seed,
        ),
        labels=labels(planner, config, levels, prefill_bits),
        features=features,
    )
