from __future__ import annotations

import pytest

from pmpd.schedulers import label


@pytest.mark.parametrize(
    ("quality", "target", "expected"),
    [
        ([0.5, 0.6, 0.7], 0.6, 1),
        ([0.7, 0.1, 0.7], 0.6, 0),  # the smallest that reaches it, though a larger one does not
        ([0.1, 0.59999, 0.2], 0.6, 2),  # none: the last; no rounding
        ([0.6], 0.9, 0),
    ],
)
def test_the_smallest_class_that_is_good_enough_else_the_last(
    quality: list[float], target: float, expected: int
) -> None:
    assert label(quality, target) == expected


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="quality is empty"):
        label([], 0.5)
