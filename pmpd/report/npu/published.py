"""Published numbers, each with the table or figure that it is from and how far it can be trusted.

``published/npu.csv`` holds them. Confidence: H printed in a primary source; M from a secondary one; L read off pixels;
*circular*: the average bits it is compared at were themselves solved from that number, so agreement shows nothing.
The three contexts (1100, 100 and 30 tokens for CNN/DM, DialogSum and IWSLT) are not published: one for each task is
fitted to the uniform bars of all its models. Knows no model of hardware.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PUBLISHED = Path(__file__).parent.parent / "published" / "npu.csv"


@dataclass(frozen=True)
class Published:
    """One published number and the case that it is for.

    Attributes:
        weight_bits: average over decode steps; of the prefill where ``quantity`` is ``prefill_overhead``.
        bits_source: where ``weight_bits`` is from.
        context_tokens: positions attended to, the mean over steps where ``prompt_tokens`` is given.
        prompt_tokens, new_tokens: a whole sequence, integrated step by step; None: a single step at the context.
        head: "counted" or "excluded".
        value: what was published, in ``unit``.
        place: source, and table or figure in it.
    """

    hardware: str
    model: str
    task: str
    schedule: str
    weight_bits: float
    bits_source: str
    context_tokens: float | None
    prompt_tokens: int | None
    new_tokens: int | None
    head: str
    quantity: str
    unit: str
    value: float
    confidence: str
    place: str

    @property
    def circular(self) -> bool:
        """Whether its average bits were solved from it."""
        return "circular" in self.confidence


@cache
def read_published() -> tuple[Published, ...]:
    """Every row, in the order of the file."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return tuple(_row(row) for row in csv.DictReader(file))


def _row(row: dict[str, str]) -> Published:
    return Published(
        hardware=row["hardware"],
        model=row["model"],
        task=row["task"],
        schedule=row["schedule"],
        weight_bits=float(row["weight_bits"]),
        bits_source=row["bits_source"],
        context_tokens=float(row["context_tokens"]) if row["context_tokens"] else None,
        prompt_tokens=int(row["prompt_tokens"]) if row["prompt_tokens"] else None,
        new_tokens=int(row["new_tokens"]) if row["new_tokens"] else None,
        head=row["head"],
        quantity=row["quantity"],
        unit=row["unit"],
        value=float(row["published"]),
        confidence=row["confidence"],
        place=row["place"],
    )
