"""The rule of the static fit."""

import pytest

from pmpd.stages.fit_static import choose

GRID = [(0,), (20,), (40,), (60,)]


@pytest.mark.parametrize(
    ("lossless", "expected"),
    [
        ([True, True, True, True], 0),
        ([False, True, True, True], 1),
        ([True, False, True, True], 2),
        ([True, True, True, False], None),
        ([False, False, False, True], 3),
    ],
)
def test_every_later_switch_must_be_lossless_too(lossless, expected):
    assert choose(GRID, lossless) == expected


def test_with_three_levels_later_means_no_switch_is_earlier():
    steps = [(0, 0), (0, 5), (5, 5), (0, 10), (5, 10), (10, 10)]
    lossless = [False, True, False, True, True, True]
    assert choose(steps, lossless) == 3  # (0, 5) is out: (5, 5) comes later in both and is lossy
