from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pmpd.decode import two_phase_nll, window_nll
from pmpd.decode.cache import with_cache
from tests.decode.plain import RoundingCell, make_prompts

Quantised = tuple[nn.Module, RoundingCell]
WINDOWS = torch.tensor(make_prompts(24, 24, 24, 24, 24))


def nll(logits: Tensor, target: int) -> float:
    return -float(logits.double().log_softmax(-1)[target])


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_whole_windows_score_every_token_but_the_first(quantised: Quantised, batch_size: int) -> None:
    model, cell = quantised
    cell.bits = 3
    expected = [
        [nll(model(window[None, :t]).logits[0, -1], int(window[t])) for t in range(1, 24)] for window in WINDOWS
    ]
    cell.bits = 16
    torch.testing.assert_close(
        window_nll(model, cell, WINDOWS, 3, batch_size=batch_size), torch.tensor(expected).double(), rtol=1e-5, atol=0
    )
    assert float(window_nll(model, cell, WINDOWS, 16).mean()) != pytest.approx(np.mean(expected), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("split", [1, 10, 22])
def test_two_phases_equal_step_by_step_decoding(quantised: Quantised, split: int, batch_size: int) -> None:
    model, cell = quantised
    expected = torch.zeros(5, 23 - split, dtype=torch.float64)
    for row, window in enumerate(WINDOWS):
        cache = DynamicCache(config=model.config)
        cell.bits = 4
        model(window[None, :split], **with_cache(model, cache))
        cell.bits = 2
        for t in range(split, 23):
            logits = model(window[None, t : t + 1], **with_cache(model, cache)).logits[0, -1]
            expected[row, t - split] = nll(logits, int(window[t + 1]))
    found = two_phase_nll(model, cell, WINDOWS, split, 4, 2, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("split", [1, 10, 22])
def test_two_phases_at_one_precision_are_the_whole_windows_second_part(quantised: Quantised, split: int) -> None:
    torch.testing.assert_close(
        two_phase_nll(*quantised, WINDOWS, split, 3, 3),
        window_nll(*quantised, WINDOWS, 3)[:, split:],
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("split", [0, 23, 24])
def test_a_split_without_two_phases_is_refused(quantised: Quantised, split: int) -> None:
    with pytest.raises(ValueError, match=rf"split={split}: 1 to 22"):
        two_phase_nll(*quantised, WINDOWS, split, 4, 2)


def test_windows_without_a_token_to_score_are_refused(quantised: Quantised) -> None:
    with pytest.raises(ValueError, match="windows of 1 tokens"):
        window_nll(*quantised, WINDOWS[:, :1], 4)
