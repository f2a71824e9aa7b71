"""MT-Bench: 80 questions of eight categories, each with a follow-up question.

There are no references: as in the paper, an answer is compared with what the same model answers at
fp16, which the evaluation supplies. Nothing of a question may be shortened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmpd.records import Sample
from pmpd.tasks.base import first_turn, select, text
from pmpd.tasks.source import DataError


@dataclass(frozen=True)
class MtBench:
    columns: tuple[str, ...] = ("prompt", "prompt_id", "category")

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """See :class:`pmpd.tasks.base.Task`. The instruction goes around the first question only."""
        samples = (_sample(row, prompt) for row in rows)
        return select(
            samples, dataset="mt_bench_prompts", split=split, limit=limit, min_reference_words=min_reference_words
        )


def _sample(row: dict[str, Any], prompt: str) -> Sample:
    sample_id = str(row["prompt_id"])
    questions = row["prompt"]
    if not isinstance(questions, list) or not questions:
        raise DataError(f"sample {sample_id}: prompt must be a list of questions, found {type(questions).__name__}")
    first, *others = (text(question, f"prompt[{turn}]", sample_id) for turn, question in enumerate(questions))
    return Sample(sample_id, (first_turn(prompt, first), *others), category=str(row["category"]))
