from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config

from pmpd.models import ModelError, Prompter, architecture, context_length, load_model, load_tokenizer, read_config
from pmpd.records import Architecture
from tests.tiny import CONTEXT, FAMILIES, HIDDEN, INTERMEDIATE, VOCAB_SIZE, tiny_model_dir


@pytest.fixture
def model_dir(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(tmp_path, family)
    model = load_model(folder, torch.float32)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert context_length(folder) == CONTEXT
    ids = torch.arange(5, 30)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert (
        load_tokenizer(folder).decode(load_tokenizer(folder)("déjà vu").input_ids, skip_special_tokens=True)
        == "déjà vu"
    )


def test_the_dtype_is_the_one_asked_for(tiny_llama: Path) -> None:
    assert {p.dtype for p in load_model(tiny_llama, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_architecture_of_grouped_query_attention(tmp_path: Path) -> None:
    head_dim = HIDDEN // 4
    assert architecture(tiny_model_dir(tmp_path, "llama_gqa")) == Architecture(
        num_layers=3,
        hidden_size=HIDDEN,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        linear_shapes=(
            (HIDDEN, HIDDEN),
            (2 * head_dim, HIDDEN),
            (2 * head_dim, HIDDEN),
            (HIDDEN, HIDDEN),
            (INTERMEDIATE, HIDDEN),
            (INTERMEDIATE, HIDDEN),
            (HIDDEN, INTERMEDIATE),
        ),
        vocab_size=VOCAB_SIZE,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_counts_the_weights_of_the_blocks(tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(tmp_path, family)
    shape = architecture(folder)
    matrices = [p for n, p in load_model(folder, torch.float32).named_parameters() if ".layers." in n and p.dim() == 2]
    assert shape.num_layers * sum(rows * columns for rows, columns in shape.linear_shapes) == sum(
        p.numel() for p in matrices
    )


def test_a_gemma_head_is_as_wide_as_its_config_says(tmp_path: Path) -> None:
    shape = architecture(tiny_model_dir(tmp_path, "gemma"))
    assert (shape.head_dim, shape.num_kv_heads) == (32, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "newer_than_us"}, "knows no model type 'newer_than_us'"),
        ({"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "odd.Odd"}}, "trust_remote_code=true"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel, which is no causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\)"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(model_dir: Path, values: dict[str, Any], message: str) -> None:
    edit_config(model_dir, **values)
    with pytest.raises(ModelError, match=message) as error:
        read_config(model_dir)
    assert str(model_dir) in str(error.value)


def test_encoders_and_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        read_config(tmp_path / "t5")
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="BertForMaskedLM, which is no causal"):
        load_model(tmp_path / "bert", torch.float32)


def test_a_folder_without_a_config_or_with_a_damaged_one_is_named(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_config(model_dir)
    (model_dir / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json in"):
        read_config(model_dir)


def test_damaged_safetensors_are_named(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b""):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            load_model(model_dir, torch.float32)


def test_a_tensor_that_is_missing_is_not_made_up(model_dir: Path) -> None:
    edit_config(model_dir, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 tensors, the first model\.layers\.2\..* would be random"):
        load_model(model_dir, torch.float32)


def test_weights_of_another_shape_are_refused(model_dir: Path) -> None:
    edit_config(model_dir, intermediate_size=INTERMEDIATE * 2)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(model_dir, torch.float32)


def test_a_missing_or_damaged_tokenizer_is_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(model_dir)
    (model_dir / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(model_dir)
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(model_dir)
    (model_dir / "tokenizer.model").write_bytes(b"sentences")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install sentencepiece protobuf"):
        load_tokenizer(model_dir)


def test_the_context_falls_back_to_the_tokenizer_and_then_stops(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = AutoConfig.for_model("bloom")  # ALiBi: its config has no number of positions
    monkeypatch.setattr("pmpd.models.load.read_config", lambda folder, trust=False: endless)
    with pytest.raises(ModelError, match="gives no context length"):
        context_length(model_dir)
    values = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps({**values, "model_max_length": 777}))
    assert context_length(model_dir) == 777


def test_a_sentencepiece_tokenizer_is_read(model_dir: Path) -> None:
    """Vicuna and MobileLLaMA come with ``tokenizer.model`` alone."""
    library = pytest.importorskip("sentencepiece", reason="needs: pip install sentencepiece")
    stored = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["The quick brown fox jumps over the lazy dog."] * 20),
        model_writer=stored,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        (model_dir / name).unlink()
    (model_dir / "tokenizer.model").write_bytes(stored.getvalue())
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        )
    )
    tokenizer = load_tokenizer(model_dir)
    text = "The lazy fox: déjà vu"
    expected = library.SentencePieceProcessor(model_proto=stored.getvalue()).encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert Prompter(tokenizer, "{user}{assistant}").ids([text]) == [tokenizer.bos_token_id, *expected]
