"""Rollouts: every prompt decoded once under every schedule asked for, sharing what can be shared.

Static fit, evaluation, labels and curves look completions up here and decode nothing. Batches are
parts: a killed run resumes at the batch it was in.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from pmpd.artifacts import read_jsonl, write_jsonl
from pmpd.decode import context_limit, decode_schedules
from pmpd.models import Prompter
from pmpd.quant import PrecisionCell
from pmpd.records import Completion, Generation, Sample, Schedule
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.runtime import load, load_prompter, progress


@dataclass(frozen=True)
class RolloutsConfig:
    """Which schedules (by name), how far, and what of the machine can change a token."""

    schedules: list[str]
    max_new_tokens: int
    template: str
    batch_size: int
    runtime: RuntimeConfig


def run_rollouts(config: RolloutsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write ``batch_*.jsonl``: a row a sample and schedule, with each turn's generation."""
    samples, prompts = read_samples(inputs["prompts"])
    schedules = [Schedule.parse(name) for name in config.schedules]
    prompter = load_prompter(inputs["model"], config.template, config.runtime.trust_remote_code)
    batches = by_length(prompts, config.batch_size)
    parts = [out / f"batch_{k:05d}.jsonl" for k in range(len(batches))]
    if not all(part.exists() for part in parts):
        model, cell = load(inputs["model"], inputs.get("nested"), config.runtime)
        for part, rows in progress(zip(parts, batches, strict=True), "rollouts", len(batches)):
            if not part.exists():
                completions = _complete_batch(
                    model, cell, prompter, [samples[i] for i in rows], [prompts[i] for i in rows], schedules, config
                )
                write_jsonl(part, [_to_json(schedule, c) for schedule, cs in completions.items() for c in cs])
    lengths = [len(g.token_ids) for table in read_rollouts(out).values() for c in table.values() for g in c.generations]
    write_summary(
        out,
        {
            "num_samples": len(samples),
            "num_schedules": len(schedules),
            "generated_tokens": sum(lengths),
            "mean_new_tokens": sum(lengths) / len(lengths),
        },
    )


def _complete_batch(
    model: nn.Module,
    cell: PrecisionCell | None,
    prompter: Prompter,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    schedules: Sequence[Schedule],
    config: RolloutsConfig,
) -> dict[Schedule, list[Completion]]:
    decode = partial(
        decode_schedules,
        model,
        cell,
        max_new_tokens=config.max_new_tokens,
        eos_ids=prompter.eos_ids,
        pad_id=prompter.pad_id,
    )
    room = (context_limit(model) or sys.maxsize) - config.max_new_tokens
    done = {
        schedule: [[generation(prompter, schedule, p, t)] for p, t in zip(prompts, tokens, strict=True)]
        for schedule, tokens in decode(prompts=prompts, schedules=schedules).items()
    }
    for turn in range(1, max(len(s.turns) for s in samples)):
        for schedule, answers in done.items():
            later = [i for i, s in enumerate(samples) if len(s.turns) > turn]
            asked = [next_prompt(prompter, samples[i], answers[i], room) for i in later]
            tokens = decode(prompts=asked, schedules=[schedule])[schedule]
            for i, prompt, ids in zip(later, asked, tokens, strict=True):
                answers[i].append(generation(prompter, schedule, prompt, ids))
    return {
        schedule: [Completion(s.id, tuple(g)) for s, g in zip(samples, answers, strict=True)]
        for schedule, answers in done.items()
    }


def next_prompt(prompter: Prompter, sample: Sample, answers: Sequence[Generation], room: int) -> list[int]:
    """The prompt of the turn after those answered.

    Raises:
        ValueError: it has more than ``room`` tokens, by sample id.
    """
    turn = len(answers)
    ids = prompter.ids(sample.turns[: turn + 1], [g.text for g in answers])
    if len(ids) > room:
        raise ValueError(
            f"turn {turn + 1} of sample {sample.id}, with the answers before it, has {len(ids)} tokens, and the "
            f"model's context leaves {room}: a smaller task.max_new_tokens leaves more and makes answers shorter"
        )
    return ids


def generation(prompter: Prompter, schedule: Schedule, prompt: Sequence[int], ids: Sequence[int]) -> Generation:
    """The record of ``ids`` generated from ``prompt``."""
    return Generation(schedule, len(prompt), tuple(ids), prompter.text(ids).strip(), ids[-1] in prompter.eos_ids)


def by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of prompts of like length, so that little padding is computed."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return [order[k : k + batch_size] for k in range(0, len(order), batch_size)]


def read_rollouts(*folders: Path) -> dict[Schedule, dict[str, Completion]]:
    """Completions by schedule and sample id, of one or several rollouts artifacts."""
    table: dict[Schedule, dict[str, Completion]] = {}
    for folder in folders:
        for part in sorted(folder.glob("batch_*.jsonl")):
            for row in read_jsonl(part):
                completion = Completion(row["id"], tuple(Generation.from_json(g) for g in row["generations"]))
                table.setdefault(Schedule.parse(row["schedule"]), {})[row["id"]] = completion
    return table


def _to_json(schedule: Schedule, completion: Completion) -> dict[str, object]:
    return {
        "id": completion.sample_id,
        "schedule": schedule.name,
        "generations": [g.to_json() for g in completion.generations],
    }


ROLLOUTS = Stage("rollouts", 2, RolloutsConfig, run_rollouts, "decoding every prompt under every schedule")
