"""Evaluation: one scheduler's completions of a test split, scored beside uniform high and fp16.

Looks completions up, decodes nothing. Every mean has n and a bootstrap interval; every comparison is
paired. A *result* is one row of the tidy frame: quantity, unit, value, ci_low, ci_high, n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.artifacts import read_jsonl, write_json, write_jsonl
from pmpd.records import Completion, Generation, Interval, Sample, Schedule, average_bits
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.bits import bits_results, chosen, mean_bits, outlier_bits, step_bits
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.scoring import (
    Encoder,
    Scores,
    exact,
    fp16_references,
    references_of,
    result,
    score_turns,
    unit_of,
)

RESULTS_FILE = "results.json"
COMPLETIONS_FILE = "completions.jsonl"
SAMPLES_FILE = "scores.jsonl"
AGREEMENT = "ROUGE-L F x 100 with the model's own fp16 output"


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and how.

    Attributes:
        schedule: the schedule by name; None when the ``choice`` or ``decisions`` input says it.
        curve: schedules whose quality is recorded too, for the figure of quality against switch step.
    """

    scheduler: str
    schedule: str | None
    high: str
    curve: list[str]
    metrics: list[str]
    max_new_tokens: int
    encoder: str
    device: str
    resamples: int
    seed: int


def run_evaluate(config: EvaluateConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Score, compare, and write results, completions and per-sample scores."""
    samples, _ = read_samples(inputs["prompts"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    fp16 = table[Schedule.uniform(16)]
    high = in_order(samples, table[Schedule.parse(config.high)])
    own = in_order(samples, chosen(inputs, config.schedule, config.max_new_tokens))
    references = references_of(samples, fp16)
    agreement = fp16_references(samples, fp16)
    encoder = Encoder(config.encoder, config.device)
    results: list[dict[str, Any]] = []

    def add(quantity: str, unit: str, interval: Interval) -> None:
        results.append(result(quantity, unit, interval))

    def compare(name: str, unit: str, scores: Scores, others: Mapping[str, Scores]) -> None:
        add(name, unit, scores.interval(config.resamples, config.seed))
        for other, theirs in others.items():
            difference = scores.minus(theirs, config.resamples, config.seed)
            add(f"{name} minus {other}", unit, difference)
            if other == "high":
                drop = scores.detectable_drop(theirs, config.resamples, config.seed)
                results.append(exact(f"{name} detectable drop", unit, drop, difference.n))

    per_sample: list[dict[str, Any]] = [{"id": s.id, "category": s.category} for s in samples]
    fp16_answers = in_order(samples, fp16)
    for metric in config.metrics:
        scored = {
            who: score_turns(metric, answers, references, encoder)
            for who, answers in (("own", own), ("high", high), ("fp16", fp16_answers))
        }
        others = {"high": scored["high"]} | ({"fp16": scored["fp16"]} if samples[0].references else {})
        compare(metric, unit_of(metric, config.encoder), scored["own"], others)
        add_categories(results, metric, samples, scored["own"], scored["high"], config)
        for row, value in zip(per_sample, scored["own"].each(), strict=True):
            row[metric] = float(value)
    agree = {
        who: score_turns("rouge_l", answers, agreement, encoder) for who, answers in (("own", own), ("high", high))
    }
    compare("agreement", AGREEMENT, agree["own"], {"high": agree["high"]})
    add_categories(results, "agreement", samples, agree["own"], agree["high"], config)
    for row, value in zip(per_sample, agree["own"].each(), strict=True):
        row["agreement"] = float(value)

    extra_bits = outlier_bits(inputs)
    results += bits_results(own, config.resamples, config.seed, extra_bits)
    add_failures(results, own, read_summary(inputs["prompts"])["metrics"].get("num_shortened", 0))
    for row, completion in zip(per_sample, own, strict=True):
        row |= {
            "average_bits": average_bits(step_bits(completion.decode_bits, extra_bits))
            if completion.decode_bits
            else None,
            "new_tokens": sum(len(g.token_ids) for g in completion.generations),
            "schedule": ";".join(g.schedule.name for g in completion.generations),
        }
    write_json(out / RESULTS_FILE, results)
    write_jsonl(out / SAMPLES_FILE, per_sample)
    write_jsonl(
        out / COMPLETIONS_FILE, [{"id": c.sample_id, "generations": [g.to_json() for g in c.generations]} for c in own]
    )
    write_summary(
        out,
        {r["quantity"]: r["value"] for r in results},
        curves={"switch_step": _curve(config, samples, table, references, encoder, extra_bits)},
        tables={"results": results},
    )


def add_categories(
    results: list[dict[str, Any]],
    metric: str,
    samples: Sequence[Sample],
    own: Scores,
    high: Scores,
    config: EvaluateConfig,
) -> None:
    """A metric of each category of samples, where a set has categories, and its paired difference to uniform high."""
    unit = unit_of(metric, config.encoder) if metric != "agreement" else AGREEMENT
    for category in sorted({s.category for s in samples if s.category}):
        index = [i for i, s in enumerate(samples) if s.category == category]
        part, base = (Scores(scores.statistics[index], scores.reduce) for scores in (own, high))
        results.append(result(f"{metric} of {category}", unit, part.interval(config.resamples, config.seed)))
        difference = part.minus(base, config.resamples, config.seed)
        results.append(result(f"{metric} of {category} minus high", unit, difference))


def add_failures(results: list[dict[str, Any]], own: Sequence[Completion], num_shortened: int) -> None:
    """What went less than well and is scored all the same: counts, of prompts and of answers."""
    answers = [g for c in own for g in c.generations]
    results.append(exact("shortened_prompts", "prompts cut to the context", num_shortened, len(own)))
    cut = sum(not g.ended for g in answers)
    results.append(exact("unended_answers", "answers that max_new_tokens cut off", cut, len(answers)))
    results.append(exact("empty_answers", "answers without a text", sum(not g.text for g in answers), len(answers)))


def _curve(
    config: EvaluateConfig,
    samples: Sequence[Sample],
    table: Mapping[Schedule, Mapping[str, Completion]],
    references: list[list[list[str]]],
    encoder: Encoder,
    extra_bits: float,
) -> list[dict[str, Any]]:
    """Quality of every candidate schedule on the test split, by the first metric."""
    rows = []
    for name in config.curve:
        schedule = Schedule.parse(name)
        answers = in_order(samples, table[schedule.canonical(config.max_new_tokens)])
        interval = score_turns(config.metrics[0], answers, references, encoder).interval(config.resamples, config.seed)
        bits = mean_bits(answers, extra_bits)
        rows.append(
            {
                "switch_step": schedule.switch_steps[0],
                "switch_steps": list(schedule.switch_steps),
                "schedule": name,
                "average_bits": bits.value() if bits else None,
                **result(config.metrics[0], unit_of(config.metrics[0], config.encoder), interval),
            }
        )
    return rows


def in_order(samples: Sequence[Sample], completions: Mapping[str, Completion]) -> list[Completion]:
    """Completions in the order of ``samples``; a missing one is our error."""
    return [completions[s.id] for s in samples]


def read_completions(path: Path) -> list[Completion]:
    """What an evaluation scored."""
    return [
        Completion(row["id"], tuple(Generation.from_json(g) for g in row["generations"]))
        for row in read_jsonl(path / COMPLETIONS_FILE)
    ]


EVALUATE = Stage("evaluate", 2, EvaluateConfig, run_evaluate, "look-ups and scoring")
