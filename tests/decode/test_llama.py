from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pmpd.decode import BufferCache, decode, prefill
from pmpd.decode.llama import FusedLlama, fuse, not_fusable
from pmpd.models import block_linears
from pmpd.quant import NestedLinear, NestedWeight, PrecisionCell, highest, take_outliers
from pmpd.records import Schedule
from pmpd.schedulers import Planned
from tests.decode.plain import make_prompts, plain_decode, tiny
from tests.tiny import CONTEXT, HIDDEN, VOCAB_SIZE

FUSED_FAMILIES = ("llama", "llama_gqa", "qwen2", "mistral")
PROMPTS = make_prompts(5, 17, 1, 30)

ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def nested(model: Any, bits: range = range(2, 5), num_outliers: int = 0) -> PrecisionCell:
    """Nested layers in place of the model's block linears; their weights are random, and differ between precisions."""
    cell = PrecisionCell()
    generator = torch.Generator().manual_seed(7)
    for name, linear in block_linears(model).items():
        out_features, in_features = linear.weight.shape
        shape = (bits.stop - 1, out_features, -(-in_features // 32))
        planes = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)
        scale = float(linear.weight.detach().double().std())
        tables = {b: (torch.randn(out_features, 1, 1 << b, generator=generator) * scale).half() for b in bits}
        weight = linear.weight.detach()
        outliers = take_outliers(weight, torch.zeros_like(weight), highest(weight.abs(), num_outliers))
        own = NestedWeight(planes, tables, in_features, None, outliers if num_outliers else None)
        layer = NestedLinear(own, linear, cell)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return cell


def logits(model: nn.Module, cell: PrecisionCell | None, bits: int) -> torch.Tensor:
    return prefill(model, cell, PROMPTS, bits, max_new_tokens=4).logits


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_a_fused_model_computes_what_its_original_does(tmp_path: Path, family: str) -> None:
    model = tiny(tmp_path, family)
    cell = nested(model)
    schedule = Schedule(4, (4, 3, 2), (3, 6))
    expected_logits = {bits: logits(model, cell, bits) for bits in (16, 4, 2)}
    expected = [plain_decode(model, cell, p, schedule, 10) for p in PROMPTS]  # type: ignore[arg-type]
    fused, fused_cell = fuse(model, cell)
    assert fused_cell is not None
    assert fused_cell.available == [2, 3, 4, 16]
    for bits, value in expected_logits.items():
        torch.testing.assert_close(logits(fused, fused_cell, bits), value, rtol=0, atol=1e-10)
    assert [plain_decode_fused(fused, fused_cell, p, schedule, 10) for p in PROMPTS] == expected
    state = prefill(fused, fused_cell, PROMPTS, 4, max_new_tokens=10)
    steps = list(decode(fused, fused_cell, state, Planned(schedule), max_new_tokens=10, eos_ids=[]))
    assert torch.stack([step.tokens for step in steps], 1).tolist() == expected


def test_outliers_are_fused_too(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama_gqa")
    cell = nested(model, num_outliers=50)
    plain = tiny(tmp_path / "again", "llama_gqa")
    expected = logits(model, cell, 3)
    without = logits(plain, nested(plain), 3)
    fused, fused_cell = fuse(model, cell)
    torch.testing.assert_close(logits(fused, fused_cell, 3), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, without)


def plain_decode_fused(
    model: FusedLlama, cell: PrecisionCell, prompt: list[int], schedule: Schedule, m: int
) -> list[int]:
    state = prefill(model, cell, [prompt], schedule.prefill_bits, max_new_tokens=m)
    return [int(s.tokens) for s in decode(model, cell, state, Planned(schedule), max_new_tokens=m, eos_ids=[])]


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_are_the_models_own(rope: str) -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        rope_parameters=ROPES[rope],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
    expected = logits(model, None, 16)
    fused, cell = fuse(model, None)
    assert cell is None
    torch.testing.assert_close(logits(fused, None, 16), expected, rtol=0, atol=1e-10)


def test_it_reads_windows_without_a_cache_and_goes_on_over_one(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama_gqa")
    ids = torch.tensor(make_prompts(24, 24, seed=3))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        fused, _ = fuse(model, None)
        torch.testing.assert_close(fused(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
        cache = BufferCache.empty(3, 24)
        parts = [fused(input_ids=part, cache=cache).logits for part in ids.split([9, 14, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)


def test_fusing_shares_nothing_twice(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama_gqa")
    before = sum(p.numel() for p in model.parameters())
    fused, _ = fuse(model, nested(model))
    assert sum(p.numel() for p in fused.parameters()) == before
    assert fused.head.weight is fused.embedding.weight


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("phi", {}, "model type phi is not of the Llama family"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"intermediate_size": 100}, "intermediate size 100 is not a multiple of 8"),
        ("mistral", {"sliding_window": 6}, "sliding window of 6 tokens"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embedding is of type dynamic"),
    ],
)
def test_other_models_are_refused_with_a_reason(
    tmp_path: Path, family: str, changes: dict[str, object], reason: str
) -> None:
    model: Any = tiny(tmp_path, family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert reason in (not_fusable(model.config) or "")
    with pytest.raises(ValueError, match=reason):
        fuse(model, None)
