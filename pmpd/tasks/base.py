"""What a task is: rows of a data set become samples, by rules that no model or tokenizer takes part in.

The tasks share here how a prompt is built, a text checked and a split cut to the number of samples
that is asked for; each task's module owns its columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pmpd.records import Sample
from pmpd.tasks.source import DataError

log = logging.getLogger(__name__)

DOCUMENT = "{document}"
"""Where the instruction text of a task takes the document."""


class Task(Protocol):
    """One data set's rules."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read; a row must have them."""

    def samples(
        self, rows: Iterable[dict[str, Any]], *, prompt: str, limit: int | None, min_reference_words: int, split: str
    ) -> list[Sample]:
        """The first ``limit`` samples (None: all) whose references are long enough, in the order of the rows.

        Args:
            prompt: the instruction, with ``{document}`` once.
            min_reference_words: keep a sample only if every reference has strictly more words than this
                (whitespace-separated). Words, not tokens: a limit in tokens would give each
                model another set of sentences, and their scores could not be compared.
            split: its name, for ids and messages.

        Raises:
            DataError: a text that is empty or not text, an id that occurs twice, no sample at all.
            ValueError: a prompt without ``{document}``, a limit below 1.
        """


def first_turn(prompt: str, document: str) -> str:
    """The instruction with the document put in; braces anywhere else are left alone.

    Raises:
        ValueError: ``{document}`` does not occur exactly once.
    """
    if prompt.count(DOCUMENT) != 1:
        raise ValueError(f"task.prompt={prompt!r} must contain {DOCUMENT} exactly once")
    return prompt.replace(DOCUMENT, document)


def text(value: Any, name: str, sample_id: str) -> str:
    """The value if it is a text with something in it.

    Raises:
        DataError: names the sample and the column.
    """
    if not isinstance(value, str):
        raise DataError(f"sample {sample_id}: {name} must be text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"sample {sample_id}: {name} is empty")
    return value


def select(
    samples: Iterable[Sample], *, dataset: str, split: str, limit: int | None, min_reference_words: int
) -> list[Sample]:
    """The first ``limit`` samples with long enough references. ``samples`` is read no further than that.

    Raises:
        DataError: an id that occurs twice, or nothing left.
        ValueError: a limit below 1, or a length rule for a data set without references.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{dataset}, split {split}: limit={limit} must be at least 1, or None for all")
    kept: dict[str, Sample] = {}
    num_short = 0
    for sample in samples:
        if min_reference_words > 0 and not sample.references:
            raise ValueError(
                f"task.min_reference_words={min_reference_words} is not possible: {dataset} has no references"
            )
        if min_reference_words > 0 and _words(sample.references) <= min_reference_words:
            num_short += 1
            continue
        if sample.id in kept:
            raise DataError(f"{dataset}, split {split}: id {sample.id} occurs twice")
        kept[sample.id] = sample
        if len(kept) == limit:
            break
    short = f"{num_short} left out by task.min_reference_words={min_reference_words}"
    if not kept:
        raise DataError(f"{dataset}, split {split}: no samples ({short})")
    if limit is not None and len(kept) < limit:
        log.warning("%s, split %s: %d samples asked for, %d found (%s)", dataset, split, limit, len(kept), short)
    return list(kept.values())


def _words(references: Sequence[str]) -> int:
    """Whitespace-separated words of the shortest reference."""
    return min(len(reference.split()) for reference in references)
