"""IWSLT 2017, French to English: translate one sentence of a talk.

The reference code keeps the sentences whose English has more than 60 tokens of Vicuna's tokenizer. Here
the limit is in words, ``min_reference_words``, so that every model translates the same sentences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmpd.records import Sample
from pmpd.tasks.base import first_turn, select, text
from pmpd.tasks.source import DataError


@dataclass(frozen=True)
class Iwslt:
    columns: tuple[str, ...] = ("translation",)

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """See :class:`pmpd.tasks.base.Task`. Rows have no id; ``<split>_<row>``, from 0, is given to them."""
        samples = (_sample(row, f"{split}_{index}", prompt) for index, row in enumerate(rows))
        return select(
            samples, dataset="iwslt2017-en-fr", split=split, limit=limit, min_reference_words=min_reference_words
        )


def _sample(row: dict[str, Any], sample_id: str, prompt: str) -> Sample:
    pair = row["translation"]
    if not isinstance(pair, dict) or not {"en", "fr"} <= pair.keys():
        found = ", ".join(sorted(pair)) if isinstance(pair, dict) else type(pair).__name__
        raise DataError(f"sample {sample_id}: translation must have en and fr, found {found}")
    french = text(pair["fr"], "translation.fr", sample_id)
    english = text(pair["en"], "translation.en", sample_id)
    return Sample(sample_id, (first_turn(prompt, french),), (english,), document=french)
