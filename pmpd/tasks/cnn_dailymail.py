"""CNN/DailyMail, version 3.0.0: summarise a news article. One reference, its highlights, a line each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmpd.records import Sample
from pmpd.tasks.base import first_turn, select, text


@dataclass(frozen=True)
class CnnDailyMail:
    columns: tuple[str, ...] = ("article", "highlights", "id")

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """See :class:`pmpd.tasks.base.Task`."""
        samples = (_sample(row, prompt) for row in rows)
        return select(
            samples, dataset="cnn_dailymail", split=split, limit=limit, min_reference_words=min_reference_words
        )


def _sample(row: dict[str, Any], prompt: str) -> Sample:
    sample_id = str(row["id"])
    article = text(row["article"], "article", sample_id)
    highlights = text(row["highlights"], "highlights", sample_id)
    return Sample(sample_id, (first_turn(prompt, article),), (highlights,), document=article)
