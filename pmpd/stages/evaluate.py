"""Evaluation: one scheduler's completions of a test split, scored beside uniform high and fp16.

Looks completions up, decodes nothing. Every mean has n and a bootstrap interval; every comparison is
paired. A *result* is one row of the tidy frame: quantity, unit, value, ci_low, ci_high, n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmpd.artifacts import read_jsonl, write_json, write_jsonl
from pmpd.records import Completion, Generation, Interval, Sample, Schedule, average_bits
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.decide import read_decisions
from pmpd.stages.fit_static import read_choice
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.scoring import (
    Encoder,
    Scores,
    fp16_references,
    mean_scores,
    references_of,
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
    if "decisions" in inputs:
        own = in_order(samples, read_decisions(inputs["decisions"]))
    else:
        schedule = read_choice(inputs["choice"]) if "choice" in inputs else Schedule.parse(str(config.schedule))
        own = in_order(samples, table[schedule.canonical(config.max_new_tokens)])
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
    add_bits(results, own, config.resamples, config.seed, extra_bits)
    add_failures(results, own, read_summary(inputs["prompts"])["metrics"].get("num_shortened", 0))
    for row, completion in zip(per_sample, own, strict=True):
        row |= {
            "average_bits": average_bits(completion.decode_bits) + extra_bits if completion.decode_bits else None,
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
        curves={"switch_step": _curve(config, samples, table, references, encoder)},
        tables={"results": results},
    )


def outlier_bits(inputs: Mapping[str, Path]) -> float:
    """Bits a weight that outliers add to every step of the completions, 0 for a model without."""
    if "dense_sparse" not in inputs:
        return 0.0
    return float(read_summary(inputs["dense_sparse"])["metrics"]["outlier_bits"])


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


def add_bits(
    results: list[dict[str, Any]], own: Sequence[Completion], resamples: int, seed: int, extra_bits: float = 0.0
) -> None:
    """Average bits over sequences (the paper's), over tokens, and how many sequences had no decode step.

    ``extra_bits``: what outliers add to every step.
    """
    decoded = [[bits + extra_bits for bits in c.decode_bits] for c in own if c.decode_bits]
    if decoded:
        by_sequence = mean_scores([sum(bits) / len(bits) for bits in decoded])
        results.append(result("average_bits", "bits, mean over sequences", by_sequence.interval(resamples, seed)))
        by_token = Scores(
            np.array([[sum(bits), len(bits)] for bits in decoded], float), lambda total: total[..., 0] / total[..., 1]
        )
        results.append(result("average_bits_tokens", "bits, mean over tokens", by_token.interval(resamples, seed)))
    lengths = mean_scores([sum(len(g.token_ids) for g in c.generations) for c in own])
    results.append(result("new_tokens", "tokens a sample", lengths.interval(resamples, seed)))
    results.append(exact("no_decode_step", "samples", len(own) - len(decoded), len(own)))


def _curve(
    config: EvaluateConfig,
    samples: Sequence[Sample],
    table: Mapping[Schedule, Mapping[str, Completion]],
    references: list[list[list[str]]],
    encoder: Encoder,
) -> list[dict[str, Any]]:
    """Quality of every candidate schedule on the test split, by the first metric."""
    rows = []
    for name in config.curve:
        schedule = Schedule.parse(name)
        answers = in_order(samples, table[schedule.canonical(config.max_new_tokens)])
        interval = score_turns(config.metrics[0], answers, references, encoder).interval(config.resamples, config.seed)
        bits = [average_bits(c.decode_bits) for c in answers if c.decode_bits]
        rows.append(
            {
                "switch_step": schedule.switch_steps[0],
                "switch_steps": list(schedule.switch_steps),
                "schedule": name,
                "average_bits": sum(bits) / len(bits) if bits else None,
                **result(config.metrics[0], unit_of(config.metrics[0], config.encoder), interval),
            }
        )
    return rows


def result(quantity: str, unit: str, interval: Interval) -> dict[str, Any]:
    """One row of the tidy frame."""
    return {
        "quantity": quantity,
        "unit": unit,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n": interval.n,
    }


def exact(quantity: str, unit: str, value: float, n: int) -> dict[str, Any]:
    """A row for a number that has no interval: a count, or a property of the sample."""
    return {"quantity": quantity, "unit": unit, "value": value, "ci_low": None, "ci_high": None, "n": n}


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
