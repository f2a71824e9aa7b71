"""Decoding as its definition says, one prompt and one token at a time, and tiny models whose precision matters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from pmpd.decode.cache import with_cache
from pmpd.records import Schedule
from tests.tiny import VOCAB_SIZE, tiny_model_dir


class RoundingCell:
    """Stands for the cell of a quantised model: layers round their weights to ``bits``."""

    def __init__(self) -> None:
        self.bits = 16


class RoundedLinear(nn.Module):
    def __init__(self, original: nn.Linear, cell: RoundingCell) -> None:
        super().__init__()
        self.original, self.cell = original, cell

    def forward(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        if self.cell.bits != 16:
            step = weight.abs().max() / 2**self.cell.bits
            weight = (weight / step).round() * step
        return functional.linear(x, weight, self.original.bias)


def tiny(tmp_path: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    """A tiny model in float64, where a batch and a single row differ by less than any gap between logits."""
    folder = tiny_model_dir(tmp_path, family, seed)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def rounded(model: nn.Module) -> tuple[nn.Module, RoundingCell]:
    """``model`` with every linear layer of its blocks following one cell."""
    cell = RoundingCell()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    assert linears
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, RoundedLinear(linear, cell))
    return model, cell


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def plain_decode(
    model: nn.Module,
    cell: RoundingCell | None,
    prompt: Sequence[int],
    schedule: Schedule,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """The definition: batch 1, no padding, a cache that grows."""

    def forward(tokens: Sequence[int], bits: int) -> int:
        if cell is not None:
            cell.bits = bits
        return int(model(torch.tensor([list(tokens)]), **with_cache(model, cache)).logits[0, -1].argmax())

    cache = DynamicCache(config=model.config)
    generated = [forward(prompt, schedule.prefill_bits)]
    while len(generated) < max_new_tokens and generated[-1] not in eos_ids:
        generated.append(forward(generated[-1:], schedule.bits_at(len(generated))))
    return generated
