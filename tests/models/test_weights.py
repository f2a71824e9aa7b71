from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pmpd.models import LazyWeights, ModelError, block_linears, linear_names, load_model
from tests.tiny import FAMILIES, tiny_model_dir


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_weights_are_the_loaded_models(tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(tmp_path, family)
    linears = block_linears(load_model(folder, torch.float32))
    assert linear_names(folder) == list(linears)
    weights = LazyWeights(folder)
    for name, linear in linears.items():
        torch.testing.assert_close(weights.weight(name), linear.weight, rtol=0, atol=0)


def test_shards_are_read(tmp_path: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    weights = LazyWeights(tmp_path / "sharded")
    for name, linear in block_linears(model).items():
        torch.testing.assert_close(weights.weight(name), linear.weight, rtol=0, atol=0)


def test_a_checkpoint_of_the_bare_decoder_lacks_the_prefix(tmp_path: Path, tiny_llama: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(LazyWeights(tmp_path).weight(name), tensors[f"{name}.weight"], rtol=0, atol=0)


def test_a_tensor_that_is_not_there_is_named(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.9\.mlp\.up_proj\.weight"):
        LazyWeights(tiny_llama).weight("model.layers.9.mlp.up_proj")
