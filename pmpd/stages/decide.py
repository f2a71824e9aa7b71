"""A task's prompts under a scheduler that decides a sequence at a time, by any policy of ``pmpd.schedulers.policies``.

A first turn whose schedule was rolled out is looked up; what is not there is decoded here: later turns, which depend on
the answers before them, and what a policy decides step by step. A killed run goes on at the batch that it was in.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pmpd.artifacts import read_jsonl, write_jsonl
from pmpd.decode import context_limit, finish, prefill
from pmpd.models import Prompter
from pmpd.quant import PrecisionCell
from pmpd.records import Completion, Generation, Sample, Schedule, class_schedules
from pmpd.schedulers import (
    Blind,
    LearnedNetwork,
    Policy,
    ReadsActivations,
    Scheduler,
    Setting,
    build,
    load_network,
)
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.labels import label_shares
from pmpd.stages.learned import NETWORK_FILE
from pmpd.stages.rollouts import by_length, generation, next_prompt, read_rollouts
from pmpd.stages.runtime import load, load_prompter, progress

COMPLETIONS_FILE = "completions.jsonl"


@dataclass(frozen=True)
class DecideConfig:
    """The policy, what it chooses among, and what of the machine can change a token."""

    policy: str
    options: dict[str, Any]
    prefill_bits: int
    levels: list[int]
    grid_parts: int
    max_new_tokens: int
    template: str
    batch_size: int
    seed: int
    runtime: RuntimeConfig


def run_decide(config: DecideConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write each sample's completion, in the order of the samples, after ``batch_*.jsonl`` with the same rows."""
    samples, prompts = read_samples(inputs["prompts"])
    table = read_rollouts(inputs["rollouts"])
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens, config.grid_parts)
    network: LearnedNetwork | None = None
    if "network" in inputs:
        network = load_network(inputs["network"] / NETWORK_FILE)
    setting = Setting(
        config.prefill_bits,
        tuple(config.levels),
        tuple(classes),
        config.seed,
        label_shares(inputs["labels"], len(classes)) if "labels" in inputs else (),
        network,
    )
    scheduler = build(config.policy, setting, config.options)
    prompter = load_prompter(inputs["model"], config.template, config.runtime.trust_remote_code)
    # Drawn for all samples before the first batch, so that neither batches nor a kill change what is drawn.
    drawn = {s.id: [scheduler.policy() for _ in s.turns] for s in samples} if isinstance(scheduler, Blind) else None
    batches = by_length(prompts, config.batch_size)
    parts = [out / f"batch_{k:05d}.jsonl" for k in range(len(batches))]
    needs_model = drawn is None or any(len(s.turns) > 1 for s in samples)
    model, cell = load(inputs["model"], inputs["nested"], config.runtime) if needs_model else (None, None)
    worker = _Worker(config, scheduler, prompter, table, model, cell)
    for part, rows in progress(zip(parts, batches, strict=True), "decide", len(batches)):
        if not part.exists():
            batch = [samples[i] for i in rows]
            answers = worker.answer(batch, [prompts[i] for i in rows], drawn)
            write_jsonl(
                part,
                [
                    {"id": s.id, "generations": [g.to_json() for g in own]}
                    for s, own in zip(batch, answers, strict=True)
                ],
            )
    written = {row["id"]: row for part in parts for row in read_jsonl(part)}
    write_jsonl(out / COMPLETIONS_FILE, [written[s.id] for s in samples])
    chosen = [g.schedule for c in read_decisions(out).values() for g in c.generations]
    counts = Counter(s.canonical(config.max_new_tokens).name for s in chosen)
    names = [c.canonical(config.max_new_tokens).name for c in classes]
    write_summary(
        out,
        {"num_samples": len(samples), "num_other": len(chosen) - sum(counts[n] for n in dict.fromkeys(names))},
        tables={"choices": [{"class": i, "schedule": n, "count": counts[n]} for i, n in enumerate(names)]},
    )


@dataclass(frozen=True)
class _Worker:
    config: DecideConfig
    scheduler: Scheduler
    prompter: Prompter
    table: Mapping[Schedule, Mapping[str, Completion]]
    model: nn.Module | None
    cell: PrecisionCell | None

    def answer(
        self, samples: Sequence[Sample], prompts: Sequence[Sequence[int]], drawn: Mapping[str, Sequence[Policy]] | None
    ) -> list[list[Generation]]:
        """A batch's answers to all of its turns."""
        limit = self.config.max_new_tokens
        answers: list[list[Generation]] = [[] for _ in samples]
        for turn in range(max(len(s.turns) for s in samples)):
            asking = [i for i, s in enumerate(samples) if len(s.turns) > turn]
            asked = [prompts[i] if turn == 0 else self._next(samples[i], answers[i]) for i in asking]
            plans = None if drawn is None else [drawn[samples[i].id][turn] for i in asking]
            if turn == 0 and plans is not None:
                found = [self._look_up(samples[i].id, plan) for i, plan in zip(asking, plans, strict=True)]
                assert all(found), "a drawn class was not rolled out"
                done: list[Generation | None] = list(found)
            else:
                done = self._decode([samples[i].id for i in asking], asked, plans, turn)
            for i, own in zip(asking, done, strict=True):
                assert own is not None
                assert len(own.token_ids) <= limit
                answers[i].append(own)
        return answers

    def _decode(
        self, ids: Sequence[str], prompts: Sequence[Sequence[int]], plans: Sequence[Policy] | None, turn: int
    ) -> list[Generation | None]:
        assert self.model is not None
        scheduler, limit = self.scheduler, self.config.max_new_tokens
        state = prefill(
            self.model,
            self.cell,
            prompts,
            scheduler.prefill_bits,
            max_new_tokens=limit,
            pad_id=self.prompter.pad_id,
            activations=isinstance(scheduler, ReadsActivations) and scheduler.reads_activations,
        )
        policies = plans or [scheduler.begin(state.view(row)) for row in range(len(prompts))]
        done = [self._look_up(i, policy) if turn == 0 else None for i, policy in zip(ids, policies, strict=True)]
        rest = {row: policy for row, policy in enumerate(policies) if done[row] is None}
        if rest:
            decoded = finish(self.model, self.cell, state, rest, eos_ids=self.prompter.eos_ids)
            for row, (schedule, tokens) in zip(rest, decoded, strict=True):
                done[row] = generation(self.prompter, schedule, prompts[row], tokens)
        return done

    def _look_up(self, sample_id: str, policy: Policy) -> Generation | None:
        """The first turn as it was rolled out; None where it was not."""
        if policy.schedule is None:
            return None
        rolled_out = self.table.get(policy.schedule.canonical(self.config.max_new_tokens))
        return None if rolled_out is None else rolled_out[sample_id].generations[0]

    def _next(self, sample: Sample, answers: Sequence[Generation]) -> list[int]:
        assert self.model is not None
        room = (context_limit(self.model) or sys.maxsize) - self.config.max_new_tokens
        return next_prompt(self.prompter, sample, answers, room)


def read_decisions(path: Path) -> dict[str, Completion]:
    """Completions by sample id."""
    return {
        row["id"]: Completion(row["id"], tuple(Generation.from_json(g) for g in row["generations"]))
        for row in read_jsonl(path / COMPLETIONS_FILE)
    }


DECIDE = Stage("decide", 3, DecideConfig, run_decide, "a prefill of every prompt, and what no rollout has")
