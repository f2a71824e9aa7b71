from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pmpd.metrics import perplexity as perplexity_of
from pmpd.metrics.perplexity import CHUNK_POSITIONS, token_nll


def plain_nll(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """The definition, in float64."""
    rows = logits.double().numpy().reshape(-1, logits.shape[-1])
    shifted = rows - rows.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(rows)), targets.reshape(-1).numpy()].reshape(targets.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, CHUNK_POSITIONS), (CHUNK_POSITIONS + 1,)])
def test_equals_the_float64_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*shape, 97, generator=generator) * 8).to(dtype)
    targets = torch.randint(97, shape, generator=generator)
    np.testing.assert_allclose(token_nll(logits, targets).numpy(), plain_nll(logits, targets), rtol=1e-5, atol=1e-6)


def test_half_precision_logits_are_not_averaged_in_half_precision() -> None:
    logits = torch.zeros(5000, 64, dtype=torch.float16)
    targets = torch.zeros(5000, dtype=torch.long)
    assert perplexity_of(token_nll(logits, targets)) == pytest.approx(64, rel=1e-6)


def test_many_small_terms_do_not_vanish_beside_a_large_one() -> None:
    logits = torch.zeros(100_001, 2)
    logits[0, 1] = 1e8  # the first term is 1e8, where float32 counts in steps of 8
    targets = torch.zeros(100_001, dtype=torch.long)
    assert float(token_nll(logits, targets).sum()) == pytest.approx(1e8 + 100_000 * math.log(2), abs=0.1)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    logits = torch.full((7, 50), 3.0)
    targets = torch.arange(7)
    assert perplexity_of(token_nll(logits, targets)) == pytest.approx(50.0, rel=1e-6)


def test_a_broken_model_is_a_number_not_a_crash() -> None:
    assert perplexity_of(torch.tensor([1e8])) == math.inf
    logits = torch.full((2, 4), math.nan)
    assert math.isnan(perplexity_of(token_nll(logits, torch.zeros(2, dtype=torch.long))))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit targets"):
        token_nll(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one scored token"):
        perplexity_of(torch.zeros(0))
