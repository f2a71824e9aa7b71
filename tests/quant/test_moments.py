"""Second moments against a plain loop over tokens, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pmpd.models import block_linears, load_model
from pmpd.quant.moments import accumulate_moments


@pytest.fixture(scope="module")
def model(tiny_llama) -> nn.Module:
    return load_model(tiny_llama, torch.float32)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def plain(model: nn.Module, windows: Tensor, name: str) -> Tensor:
    """Token after token in float64: the gradient at the layer's output times its input."""
    layer = model.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["x"] = args[0].detach()[0]
        seen["offset"] = torch.zeros_like(output, requires_grad=True)
        return output + seen["offset"]

    handle = layer.register_forward_hook(keep)
    total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1]
        loss = functional.cross_entropy(logits, window[1:])
        (gradient,) = torch.autograd.grad(loss, seen["offset"])
        for x, g in zip(seen["x"].double(), gradient[0].double(), strict=True):
            total += g.square().mean() * torch.outer(x, x)
    handle.remove()
    return total / total.diagonal().mean()


def test_moments_are_the_plain_sums(model: nn.Module, windows: Tensor) -> None:
    layers = block_linears(model)
    names = [next(n for n in layers if n.endswith(end)) for end in ("q_proj", "down_proj", "o_proj")]
    found = accumulate_moments(model, windows, {n: layers[n] for n in names})
    for name in names:
        torch.testing.assert_close(found[name].double(), plain(model, windows, name), rtol=1e-4, atol=1e-5)
        assert torch.equal(found[name], found[name].T) or torch.allclose(found[name], found[name].T, atol=1e-5)
        assert torch.linalg.eigvalsh(found[name].double()).min() > -1e-5


def test_layers_a_part_at_a_time_are_the_same(model: nn.Module, windows: Tensor) -> None:
    layers = block_linears(model)
    whole = accumulate_moments(model, windows, layers)
    name = list(layers)[-1]
    assert torch.equal(whole[name], accumulate_moments(model, windows, {name: layers[name]})[name])


def test_the_model_is_left_as_it_was(model: nn.Module, windows: Tensor) -> None:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    accumulate_moments(model, windows, block_linears(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_input_is_refused(model: nn.Module, windows: Tensor) -> None:
    layers = block_linears(model)
    with pytest.raises(ValueError, match="windows is empty"):
        accumulate_moments(model, [], layers)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        accumulate_moments(model, windows[:, :1], layers)
    half = nn.Linear(4, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        accumulate_moments(model, windows, {"half": half})
