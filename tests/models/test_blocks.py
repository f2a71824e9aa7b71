from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pmpd.models import ModelError, attach, block_index, block_linears, load_model
from pmpd.quant import quantize_weight
from tests.tiny import FAMILIES, tiny_model_dir

IDS = torch.arange(5, 30)[None]


def write_nested(folder: Path, out: Path) -> Path:
    """A nested model of 2 to 4 bits, one file a block."""
    out.mkdir()
    linears = block_linears(load_model(folder, torch.float32))
    for block in range(1 + max(map(block_index, linears))):
        tensors: dict[str, torch.Tensor] = {}
        for name in (n for n in linears if block_index(n) == block):
            weight = linears[name].weight
            nested = quantize_weight(weight, torch.ones_like(weight), seed_bits=2, parent_bits=4)
            tensors |= nested.to_tensors(name)
        save_file(tensors, out / f"block_{block:03d}.safetensors")
    return out


@pytest.mark.parametrize(
    ("family", "layers_a_block", "first"),
    [
        ("llama", 7, "model.layers.0.self_attn.q_proj"),
        ("llama_gqa", 7, "model.layers.0.self_attn.q_proj"),
        ("phi", 6, "model.layers.0.self_attn.q_proj"),
        ("stablelm", 7, "model.layers.0.self_attn.q_proj"),
        ("qwen2", 7, "model.layers.0.self_attn.q_proj"),
        ("mistral", 7, "model.layers.0.self_attn.q_proj"),
        ("gemma", 7, "model.layers.0.self_attn.q_proj"),
        ("gpt_neox", 4, "gpt_neox.layers.0.attention.query_key_value"),
        ("opt", 6, "model.decoder.layers.0.self_attn.k_proj"),
    ],
)
def test_the_blocks_linears_and_nothing_else(tmp_path: Path, family: str, layers_a_block: int, first: str) -> None:
    model = load_model(tiny_model_dir(tmp_path, family), torch.float32)
    linears = block_linears(model)
    assert next(iter(linears)) == first
    num_layers = model.config.num_hidden_layers
    assert [block_index(name) for name in linears] == [i for i in range(num_layers) for _ in range(layers_a_block)]
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())
    assert model.get_output_embeddings() not in linears.values()


def test_every_family_is_covered() -> None:
    assert set(FAMILIES) == {
        mark
        for mark, *_ in next(
            m.args[1]
            for m in test_the_blocks_linears_and_nothing_else.pytestmark  # type: ignore[attr-defined]
        )
    }


def test_gpt2_is_refused_by_name(tmp_path: Path) -> None:
    model = load_model(tiny_model_dir(tmp_path, "gpt2"), torch.float32)
    with pytest.raises(
        ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight of this GPT2LMHeadModel is a Conv1D"
    ):
        block_linears(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_is_the_original_at_16_bits_and_the_dequantised_one_below(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_model_dir(tmp_path, family)
    model = load_model(folder, torch.float32)
    names = list(model.state_dict())
    with torch.no_grad():
        original = model(IDS).logits
        cell = attach(model, write_nested(folder, tmp_path / "nested"))
        assert cell.available == [2, 3, 4, 16]
        torch.testing.assert_close(model(IDS).logits, original, rtol=0, atol=0)
        for bits in (4, 2):
            cell.bits = bits
            expected = load_model(folder, torch.float32)
            for linear in block_linears(expected).values():
                nested = quantize_weight(linear.weight, torch.ones_like(linear.weight), seed_bits=2, parent_bits=4)
                linear.weight.copy_(nested.dequantize(bits, torch.float32))
            torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
            assert (model(IDS).logits - original).abs().max() > 1e-3
        cell.bits = 16
        torch.testing.assert_close(model(IDS).logits, original, rtol=0, atol=0)
    assert list(model.state_dict()) == names


def test_a_nested_model_of_another_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    nested = write_nested(tiny_llama, tmp_path / "nested")
    phi = load_model(tiny_model_dir(tmp_path, "phi"), torch.float32)
    with pytest.raises(ModelError, match="made from another model"):
        attach(phi, nested)
    narrow = load_model(tiny_model_dir(tmp_path, "llama_gqa"), torch.float32)
    with pytest.raises(ModelError, match=r"layer model\.layers\.0\.self_attn\.k_proj: the nested weight is \[64, 64\]"):
        attach(narrow, nested)
    longer = load_model(tiny_model_dir(tmp_path, "llama", 1, num_layers=3), torch.float32)
    with pytest.raises(ModelError, match=r"lacks 7 layers of the model, the first model\.layers\.2"):
        attach(longer, nested)


def test_a_folder_without_a_nested_model_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="no nested model in"):
        attach(load_model(tiny_llama, torch.float32), tmp_path)


def test_precisions_above_the_highest_wanted_are_left(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama")
    model = load_model(folder, torch.float32)
    cell = attach(model, write_nested(folder, tmp_path / "nested"), max_bits=3)
    assert cell.available == [2, 3, 16]
    assert all(layer.nested is not None and layer.nested.parent_bits == 3 for layer in cell.layers)
