"""The two searches as rules over scores."""

import pytest

from pmpd.stages.search import cheapest_pair, lowest_lossless


@pytest.mark.parametrize(
    ("curve", "tolerance", "expected"),
    [
        ({16: 10.0, 4: 10.2, 3: 10.5, 2: 30.0}, 0.05, 3),
        ({16: 10.0, 4: 10.2, 3: 10.51, 2: 30.0}, 0.05, 4),
        ({16: 10.0, 4: 11.0, 3: 10.1, 2: 30.0}, 0.05, None),
        ({16: 10.0, 5: 10.1, 4: 11.0, 3: 10.1}, 0.05, 5),
        ({16: 10.0, 4: float("nan")}, 0.05, None),
        ({16: 10.0, 4: 9.9}, 0.0, 4),
    ],
)
def test_lowest_lossless_is_the_last_before_the_first_lossy(curve, tolerance, expected):
    assert lowest_lossless(curve, tolerance) == expected


def brute_force(precisions, score, limit):
    pairs = [(p, d) for p in precisions for d in precisions if p >= d and score(p, d) <= limit]
    return min(pairs, key=lambda pair: (pair[1], pair[0]), default=None)


@pytest.mark.parametrize("limit", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 9.0])
def test_cheapest_pair_is_that_of_an_exhaustive_search_when_quality_is_monotone(limit):
    precisions = range(2, 9)

    def score(prefill, decode):
        return 4.0 / prefill + 6.0 / decode

    pair, scores = cheapest_pair(precisions, score, limit)
    assert pair == brute_force(precisions, score, limit)
    assert len(scores) <= 2 * len(precisions)
    assert all(prefill >= decode for prefill, decode in scores)


def test_no_pair_when_the_highest_misses():
    assert cheapest_pair([2, 3], lambda p, d: 10.0, 1.0)[0] is None
