"""Labels of the seed prompts: which class of schedules each should have had, judged by its rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pmpd.artifacts import read_jsonl, write_jsonl
from pmpd.metrics import rouge_l
from pmpd.records import FP16_BITS, Completion, Schedule, class_schedules
from pmpd.schedulers import label
from pmpd.stages.base import Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.runtime import progress

LABELS_FILE = "labels.jsonl"


@dataclass(frozen=True)
class LabelsConfig:
    """The classes.

    Attributes:
        max_new_tokens: M at which the labels are made (the paper: 256).
        grid_parts: parts of M that classes are fractions of (the paper: 3).
    """

    prefill_bits: int
    levels: list[int]
    grid_parts: int
    max_new_tokens: int


def run_labels(config: LabelsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write each sample's label, the quality of every class and the target.

    A label is the smallest class whose output's ROUGE-L to the fp16 output is at least uniform high's, else the last.
    """
    samples, _ = read_samples(inputs["prompts"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens, config.grid_parts)
    fp16, high = table[Schedule.uniform(FP16_BITS)], table[Schedule.uniform(config.levels[0])]

    def agreement(completion: Completion) -> float:
        return rouge_l(completion.generations[0].text, [fp16[completion.sample_id].generations[0].text])

    rows = []
    for sample in progress(samples, "labels"):
        quality = [agreement(table[c.canonical(config.max_new_tokens)][sample.id]) for c in classes]
        target = agreement(high[sample.id])
        rows.append({"id": sample.id, "label": label(quality, target), "quality": quality, "target": target})
    write_jsonl(out / LABELS_FILE, rows)
    counts = Counter(row["label"] for row in rows)
    write_summary(
        out,
        {"num_samples": len(rows), "num_classes": len(classes)},
        tables={
            "labels": [
                {"class": k, "schedule": c.name, "count": counts[k], "share": counts[k] / len(rows)}
                for k, c in enumerate(classes)
            ]
        },
    )


def read_labels(path: Path) -> dict[str, int]:
    """Labels by sample id."""
    return {row["id"]: row["label"] for row in read_jsonl(path / LABELS_FILE)}


def label_shares(path: Path, num_classes: int) -> tuple[float, ...]:
    """How often each class is the label, as shares."""
    counts = Counter(read_labels(path).values())
    return tuple(counts[k] / counts.total() for k in range(num_classes))


LABELS = Stage("labels", 1, LabelsConfig, run_labels, "look-ups and scoring")
