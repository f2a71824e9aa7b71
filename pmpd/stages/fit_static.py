"""The static schedule of a task: the cheapest one that is lossless on the validation split.

*Lossless*: the task's first metric is not below uniform high's by more than ``tolerance`` (absolute). As in
the paper the decision is on the point estimate; the paired interval and the smallest drop that these
samples could have shown stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.artifacts import read_json, write_json
from pmpd.records import Completion, Schedule, average_bits
from pmpd.stages.base import Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.scoring import Encoder, mean_scores, references_of, score_turns

CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class FitStaticConfig:
    """Candidates and the rule.

    Attributes:
        schedules: candidates by name, with their switch steps spelled out (not canonical).
        max_new_tokens: M, under which candidates become canonical and are looked up.
        high: the name of the uniform-high schedule.
    """

    schedules: list[str]
    max_new_tokens: int
    high: str
    metric: str
    tolerance: float
    encoder: str
    device: str
    resamples: int
    seed: int


def choose(switch_steps: Sequence[tuple[int, ...]], lossless: Sequence[bool]) -> int | None:
    """Index of the first candidate for which it and *every* candidate that switches nowhere earlier is lossless.

    Quality is not monotone in the switch step, so one lossless step followed by a lossy one does not count.
    ``switch_steps`` come cheapest first. None when no candidate qualifies.
    """
    for i, steps in enumerate(switch_steps):
        later = [k for k, other in enumerate(switch_steps) if all(b >= a for a, b in zip(steps, other, strict=True))]
        if all(lossless[k] for k in later):
            return i
    return None


def run_fit_static(config: FitStaticConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Score every candidate on the validation rollouts and write the choice.

    Where no candidate is lossless (possible only when prefill is not at high precision) the last one is
    taken and said to be lossy.
    """
    samples, _ = read_samples(inputs["prompts"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    candidates = [Schedule.parse(name) for name in config.schedules]
    references = references_of(samples, table[Schedule.uniform(16)])
    encoder = Encoder(config.encoder, config.device)

    def completions(schedule: Schedule) -> list[Completion]:
        return [table[schedule.canonical(config.max_new_tokens)][s.id] for s in samples]

    high = score_turns(config.metric, completions(Schedule.parse(config.high)), references, encoder)
    rows: list[dict[str, Any]] = []
    lossless: list[bool] = []
    for schedule in candidates:
        answers = completions(schedule)
        scores = score_turns(config.metric, answers, references, encoder)
        difference = scores.minus(high, config.resamples, config.seed)
        interval = scores.interval(config.resamples, config.seed)
        bits = [average_bits(c.decode_bits) for c in answers if c.decode_bits]
        lossless.append(scores.value() >= high.value() - config.tolerance)
        rows.append(
            {
                "switch_step": schedule.switch_steps[0],
                "switch_steps": list(schedule.switch_steps),
                "schedule": schedule.name,
                "average_bits": mean_scores(bits).value() if bits else None,
                "metric": config.metric,
                "value": interval.value,
                "ci_low": interval.low,
                "ci_high": interval.high,
                "n": interval.n,
                "minus_high": difference.value,
                "minus_high_low": difference.low,
                "minus_high_high": difference.high,
                "detectable_drop": scores.detectable_drop(high, config.resamples, config.seed),
                "lossless": lossless[-1],
            }
        )
    chosen = choose([s.switch_steps for s in candidates], lossless)
    index = len(candidates) - 1 if chosen is None else chosen
    write_json(out / CHOICE_FILE, {"schedule": candidates[index].name, "lossless": chosen is not None})
    write_summary(
        out,
        {
            "schedule": candidates[index].name,
            "lossless": chosen is not None,
            "high": high.value(),
            "n": len(samples),
            "detectable_drop": max(r["detectable_drop"] for r in rows),
        },
        curves={"switch_step": rows},
    )


def read_choice(path: Path) -> Schedule:
    return Schedule.parse(read_json(path / CHOICE_FILE)["schedule"])


FIT_STATIC = Stage("fit_static", 1, FitStaticConfig, run_fit_static, "look-ups and scoring")
