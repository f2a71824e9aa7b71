"""The tidy frame: one row a number, with its interval, its n and the key of the artifact that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pmpd.records import FP16_BITS

COLUMNS = (
    "model",
    "task",
    "scheduler",
    "prefill_bits",
    "high_bits",
    "low_bits",
    "average_bits",
    "metric",
    "unit",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "key",
)


@dataclass(frozen=True)
class CellRecord:
    """What a finished cell has to say.

    Attributes:
        results: rows with quantity, unit, value, ci_low, ci_high, n and key.
        switch_curve: rows of quality by candidate schedule on the test split.
        fit_curve: the same on the validation split, for a fitted static schedule.
        perplexity_curve: rows of bits and perplexity of the model, with its rise over fp16's, interval, power and key.
        linears: times of the linear layers alone, on a GPU.
        tolerance: of the search, relative to fp16's perplexity.
        note: how the schedule was chosen, in a phrase.
    """

    model: str
    task: str
    scheduler: str
    prefill_bits: int
    levels: tuple[int, ...]
    metrics: tuple[str, ...]
    results: list[dict[str, Any]]
    switch_curve: list[dict[str, Any]] = field(default_factory=list)
    fit_curve: list[dict[str, Any]] = field(default_factory=list)
    perplexity_curve: list[dict[str, Any]] = field(default_factory=list)
    linears: list[dict[str, Any]] = field(default_factory=list)
    tolerance: float = 0.05
    note: str = ""

    def find(self, quantity: str) -> dict[str, Any] | None:
        """The result row of a quantity."""
        return next((r for r in self.results if r["quantity"] == quantity), None)


def one_each_model(records: Sequence[CellRecord]) -> list[CellRecord]:
    """The first record of every model: for what is of the model, not of a cell."""
    return list({r.model: r for r in reversed(records)}.values())[::-1]


def tidy(records: Sequence[CellRecord]) -> pd.DataFrame:
    """All results as one frame with :data:`COLUMNS`; a model's perplexity is of no task and no scheduler."""
    rows: list[dict[str, Any]] = []
    for record in records:
        bits = record.find("average_bits")
        for result in record.results:
            rows.append(
                {
                    "model": record.model,
                    "task": record.task,
                    "scheduler": record.scheduler,
                    "prefill_bits": record.prefill_bits,
                    "high_bits": record.levels[0],
                    "low_bits": record.levels[-1],
                    "average_bits": bits["value"] if bits else None,
                    "metric": result["quantity"],
                    "unit": result["unit"],
                    "value": result["value"],
                    "ci_low": result["ci_low"],
                    "ci_high": result["ci_high"],
                    "n": result["n"],
                    "key": result["key"],
                }
            )
    for record in one_each_model(records):
        rows += _perplexity_rows(record)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _perplexity_rows(record: CellRecord) -> list[dict[str, Any]]:
    """The search's numbers as they stand in its table: at each precision, prefill or not."""
    rows = []
    for point in record.perplexity_curve:
        bits, name = point["bits"], f"perplexity_{point['bits']}_bits"
        common = {"model": record.model, "n": point["n"], "key": point["key"]}
        common |= dict.fromkeys(("prefill_bits", "high_bits", "low_bits", "average_bits"), bits)
        rows.append(common | {"metric": name, "unit": "of plain text; n: windows", "value": point["perplexity"]})
        if bits == FP16_BITS:
            continue
        rise = {"metric": f"{name} over fp16", "unit": "relative, of the same windows", "value": point["relative"]}
        rows.append(common | rise | {"ci_low": point["relative_low"], "ci_high": point["relative_high"]})
        least = {"metric": f"{name} detectable rise", "unit": "relative", "value": point["detectable_rise"]}
        rows.append(common | least)
    return rows
