"""The oracle: for every sample the class that hindsight would choose. A ceiling, no scheduler: it knows the answers.

A sample's quality is the task's first metric of it alone; BLEU of one sentence is mostly 0, so sentences are judged by
SacreBLEU's smoothed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmpd.artifacts import write_jsonl
from pmpd.records import FP16_BITS, Schedule, class_schedules
from pmpd.schedulers import label
from pmpd.stages.base import Stage, write_summary
from pmpd.stages.decide import COMPLETIONS_FILE
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.scoring import Encoder, references_of, score_turns


@dataclass(frozen=True)
class OracleConfig:
    """The classes and how a sample's is chosen.

    Attributes:
        hindsight: ``best``, the class of the highest quality, the cheapest of several; ``lossless``, the cheapest
            whose quality is not below uniform high's on this sample, else the last: what labels are made by.
    """

    prefill_bits: int
    levels: list[int]
    grid_parts: int
    max_new_tokens: int
    hindsight: str
    metric: str
    encoder: str
    device: str


def choose(quality: Sequence[float], target: float, hindsight: str) -> int:
    """The class, from qualities in order of average bits, cheapest first."""
    if hindsight == "lossless":
        return label(quality, target)
    assert hindsight == "best", hindsight
    return max(range(len(quality)), key=lambda k: (quality[k], -k))


def run_oracle(config: OracleConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write each sample's completion under its class, all of its turns under the same one."""
    samples, _ = read_samples(inputs["prompts"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens, config.grid_parts)
    canonical = [c.canonical(config.max_new_tokens) for c in classes]
    references = references_of(samples, table[Schedule.uniform(FP16_BITS)])
    metric = "sacrebleu" if config.metric == "bleu" else config.metric
    encoder = Encoder(config.encoder, config.device)

    def each(schedule: Schedule) -> list[float]:
        answers = [table[schedule][s.id] for s in samples]
        return [float(v) for v in score_turns(metric, answers, references, encoder).each()]

    quality = [each(schedule) for schedule in canonical]
    target = each(Schedule.uniform(config.levels[0]))
    chosen = [choose([own[i] for own in quality], target[i], config.hindsight) for i in range(len(samples))]
    write_jsonl(
        out / COMPLETIONS_FILE,
        [
            {"id": s.id, "generations": [g.to_json() for g in table[canonical[k]][s.id].generations]}
            for s, k in zip(samples, chosen, strict=True)
        ],
    )
    counts = Counter(chosen)
    write_summary(
        out,
        {"num_samples": len(samples)},
        tables={"choices": [{"class": k, "schedule": s.name, "count": counts[k]} for k, s in enumerate(canonical)]},
    )


ORACLE = Stage("oracle", 1, OracleConfig, run_oracle, "look-ups and scoring")
