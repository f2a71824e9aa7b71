from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pmpd.decode.ahead import ahead
from pmpd.records import Step

EOS = 9
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Endless:
    """Steps of rows that say their tokens in turn, counted."""

    def __init__(self, tokens: list[list[int]], device: str) -> None:
        self.tokens, self.device, self.taken = tokens, device, 0

    def __iter__(self) -> Iterator[Step]:
        rows = torch.arange(len(self.tokens), device=self.device)
        for index, tokens in enumerate(zip(*self.tokens, strict=True)):
            self.taken += 1
            yield Step(index, torch.tensor(tokens, device=self.device), 3, rows)


def run(tokens: list[list[int]], device: str, lookahead: int = 2) -> tuple[list[list[int]], int]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    steps = Endless(tokens, device)
    out: list[list[int]] = [[] for _ in tokens]
    for index, step in enumerate(ahead(iter(steps), [EOS], lookahead)):
        assert step.index == index
        assert not step.tokens.is_cuda
        for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
            out[row].append(token)
    return out, steps.taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lookahead", [0, 1, 2, 5, 20])
def test_rows_end_with_their_own_end_of_sequence(device: str, lookahead: int) -> None:
    out, _ = run([[1, 2, EOS, 4, 5, 6, 7, 8], [1, 2, 3, 4, EOS, 6, 7, 8], [EOS] * 8], device, lookahead)
    assert out == [[1, 2, EOS], [1, 2, 3, 4, EOS], [EOS]]


@pytest.mark.parametrize("device", DEVICES)
def test_without_an_end_everything_comes_out(device: str) -> None:
    tokens = [list(range(8)), list(range(10, 18))]
    assert run(tokens, device) == (tokens, 8)
    assert run([[1]], device, 5) == ([[1]], 1)


@pytest.mark.parametrize(("device", "overrun"), [("cpu", 0), pytest.param("cuda", 2, marks=pytest.mark.gpu)])
def test_the_overrun_is_no_longer_than_the_lookahead(device: str, overrun: int) -> None:
    out, taken = run([[1, 2, EOS, *[5] * 20], [EOS, *[5] * 22]], device)
    assert out == [[1, 2, EOS], [EOS]]
    assert taken == 3 + overrun
