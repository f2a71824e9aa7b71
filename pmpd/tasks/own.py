"""Texts of the user's own: a line ``{"document": ..., "reference": ...}`` a sample.

``reference`` is a text or a list of texts that would each do. Left out of every row, answers are compared with
what the same model answers at fp16, which the evaluation supplies. ``id`` may be left out too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pmpd.records import Sample
from pmpd.tasks.base import first_turn, select, text
from pmpd.tasks.source import DataError


@dataclass(frozen=True)
class Own:
    columns: tuple[str, ...] = ("document",)

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """See :class:`pmpd.tasks.base.Task`. A row without an id gets ``<split>_<row>``, from 0."""
        samples = _samples(rows, split, prompt)
        return select(samples, dataset="own", split=split, limit=limit, min_reference_words=min_reference_words)


def _samples(rows: Iterable[dict[str, Any]], split: str, prompt: str) -> Iterator[Sample]:
    with_references: bool | None = None
    for index, row in enumerate(rows):
        sample_id = str(row.get("id", f"{split}_{index}"))
        document = text(row["document"], "document", sample_id)
        references = _references(row, sample_id)
        if with_references not in (None, bool(references)):
            raise DataError(f"sample {sample_id}: some rows have a reference and some have none")
        with_references = bool(references)
        yield Sample(sample_id, (first_turn(prompt, document),), references, document=document)


def _references(row: dict[str, Any], sample_id: str) -> tuple[str, ...]:
    given = row.get("reference", [])
    return tuple(text(r, "reference", sample_id) for r in (given if isinstance(given, list) else [given]))
