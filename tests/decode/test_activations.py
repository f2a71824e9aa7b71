"""Statistics of activations against a plain forward, one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmpd.decode import prefill
from tests.decode.plain import make_prompts, tiny


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_padding_and_batch_do_not_change_them(tmp_path: Path, family: str) -> None:
    model = tiny(tmp_path, family)
    prompts = make_prompts(5, 17, 9)
    state = prefill(model, None, prompts, 16, max_new_tokens=4, activations=True)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        found = state.view(row).activations
        assert found is not None
        assert found.shape == (2, 2, 64)
        # The last of transformers' hidden states is after the final norm: the blocks' outputs are those before it.
        for layer, states in enumerate(hidden[1:-1]):
            torch.testing.assert_close(found[layer, 0], states[0].mean(0).float(), rtol=0, atol=1e-5)
            torch.testing.assert_close(found[layer, 1], states[0].var(0, correction=0).float(), rtol=0, atol=1e-5)
    state.keep(torch.tensor([2]))
    again = prefill(model, None, [prompts[2]], 16, max_new_tokens=4, activations=True)
    torch.testing.assert_close(state.view(0).activations, again.view(0).activations, rtol=0, atol=1e-5)


def test_they_are_not_computed_unasked(tmp_path: Path) -> None:
    state = prefill(tiny(tmp_path), None, make_prompts(5), 16, max_new_tokens=4)
    assert state.view(0).activations is None
