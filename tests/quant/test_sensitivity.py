from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pmpd.quant.sensitivity import accumulate

VOCAB = 11


class TinyModel(nn.Module):
    """A language model of two linear layers, with dropout that only training would switch on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, VOCAB)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        x = self.embedding(input_ids)
        x = x + self.dropout(self.down(torch.tanh(self.up(x))))
        return SimpleNamespace(logits=self.head(x))


@pytest.fixture
def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in (9, 5, 12)]


@pytest.fixture
def model() -> TinyModel:
    return TinyModel().eval()


def layers_of(model: TinyModel) -> dict[str, nn.Linear]:
    return {"a.up": model.up, "a.down": model.down}


def test_it_is_the_mean_of_squared_gradients(model: TinyModel, windows: list[Tensor]) -> None:
    result = accumulate(model, windows, layers_of(model))
    exact = TinyModel().double().eval()
    weights = [exact.up.weight, exact.down.weight]
    expected = [torch.zeros_like(w) for w in weights]
    for window in windows:
        losses = [
            -functional.log_softmax(exact(window[None], use_cache=False).logits[0, t], 0)[window[t + 1]]
            for t in range(len(window) - 1)
        ]
        for total, gradient in zip(expected, torch.autograd.grad(sum(losses) / len(losses), weights), strict=True):
            total += gradient**2 / len(windows)
    assert list(result) == ["a.up", "a.down"]
    for value, wanted in zip(result.values(), expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-12)


def test_it_repeats_and_leaves_the_model_as_it_was(model: TinyModel, windows: list[Tensor]) -> None:
    model.train()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    with torch.no_grad():
        first = accumulate(model, windows, layers_of(model))
        second = accumulate(model, windows, layers_of(model))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_no_other_parameter_gets_a_gradient(model: TinyModel, windows: list[Tensor]) -> None:
    wanted: set[str] = set()

    def look(module: nn.Module, args: object, output: object) -> None:
        wanted.update(name for name, p in model.named_parameters() if p.requires_grad)

    model.register_forward_hook(look)
    accumulate(model, windows, {"a.up": model.up})
    assert wanted == {"up.weight"}


def test_bfloat16_gradients_are_summed_in_float32(model: TinyModel, windows: list[Tensor]) -> None:
    expected = accumulate(model, windows, layers_of(model))
    result = accumulate(model.bfloat16(), windows, layers_of(model))
    for name, value in result.items():
        assert value.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(value.flatten(), expected[name].flatten(), 0) > 0.99


def test_the_flags_come_back_after_an_error(model: TinyModel) -> None:
    model.requires_grad_(False)
    with pytest.raises(IndexError):
        accumulate(model, [torch.tensor([1, VOCAB + 5])], layers_of(model))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("bad_windows", "match"),
    [([], "windows is empty"), ([torch.tensor([1])], "2 tokens"), ([torch.ones(2, 3, dtype=torch.long)], "tokens")],
)
def test_bad_windows_are_refused(model: TinyModel, bad_windows: list[Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        accumulate(model, bad_windows, layers_of(model))


def test_float16_is_refused(model: TinyModel, windows: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"a\.up is float16"):
        accumulate(model.half(), windows, layers_of(model))


def test_a_gradient_that_is_not_finite_is_refused(model: TinyModel, windows: list[Tensor]) -> None:
    with torch.no_grad():
        model.down.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        accumulate(model, windows, layers_of(model))
