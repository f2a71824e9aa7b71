"""DialogSum: summarise a conversation.

A test dialogue has three summaries by three annotators, in three adjacent rows ``test_0_1``, ``test_0_2``,
``test_0_3``. They are one sample with three references: as three samples, each prompt would be
decoded three times and its dialogue counted three times in every mean and interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pmpd.records import Sample
from pmpd.tasks.base import first_turn, select, text
from pmpd.tasks.source import DataError


@dataclass(frozen=True)
class DialogSum:
    columns: tuple[str, ...] = ("id", "dialogue", "summary", "topic")

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """See :class:`pmpd.tasks.base.Task`. ``limit`` counts dialogues, not rows."""
        return select(
            _samples(rows, prompt),
            dataset="dialogsum",
            split=split,
            limit=limit,
            min_reference_words=min_reference_words,
        )


def _dialogue_id(row: dict[str, Any]) -> str:
    """``test_0`` for ``test_0_2``; ``dev_0``, which has one summary, stays as it is."""
    row_id = str(row["id"])
    several = re.fullmatch(r"(.+_\d+)_\d+", row_id)
    return several[1] if several else row_id


def _samples(rows: Iterable[dict[str, Any]], prompt: str) -> Iterator[Sample]:
    for dialogue_id, group in groupby(rows, key=_dialogue_id):
        dialogue, references = "", []
        for row in group:
            row_id = str(row["id"])
            own = text(row["dialogue"], "dialogue", row_id)
            dialogue = dialogue or own
            if own.split() != dialogue.split():
                raise DataError(f"sample {row_id}: its dialogue is not that of the other rows of {dialogue_id}")
            references.append(text(row["summary"], "summary", row_id))
        yield Sample(dialogue_id, (first_turn(prompt, dialogue),), tuple(references), document=dialogue)
