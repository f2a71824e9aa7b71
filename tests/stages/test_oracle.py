"""What hindsight chooses, from qualities by class, cheapest first."""

import pytest

from pmpd.stages.oracle import choose


@pytest.mark.parametrize(
    ("quality", "target", "best", "lossless"),
    [
        ([1.0, 3.0, 2.0, 3.0], 2.0, 1, 1),
        ([1.0, 2.0, 3.0, 2.0], 2.0, 2, 1),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 0, 0),
        ([1.0, 2.0, 1.5, 1.9], 5.0, 1, 3),
        ([2.0, 9.0, 9.0, 2.0], 2.0, 1, 0),
    ],
)
def test_best_is_the_cheapest_of_the_best_and_lossless_the_cheapest_not_below_high(quality, target, best, lossless):
    assert choose(quality, target, "best") == best
    assert choose(quality, target, "lossless") == lossless
