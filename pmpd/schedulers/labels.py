"""Which class a learned scheduler should have chosen. Knows no text and no metric."""

from __future__ import annotations

from collections.abc import Sequence


def label(quality: Sequence[float], target: float) -> int:
    """The smallest class whose quality is at least ``target``, else the last.

    ``quality`` is by class in order of average bits; compare unrounded values (the paper's section on the
    learned scheduler: quality of the mixed output against that of uniform high).

    Raises:
        ValueError: no classes.
    """
    if not quality:
        raise ValueError("quality is empty: a label needs at least one class")
    return next((k for k, value in enumerate(quality) if value >= target), len(quality) - 1)
