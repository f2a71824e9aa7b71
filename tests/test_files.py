"""Files that are whole or as they were, and digests of them."""

import json

import pytest
import torch
from safetensors import safe_open

from pmpd.files import atomic, digest_files, write_json, write_tensors


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {name: name * 3 for name in ("one", "two", "three", "four", "fünf")}
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3)}
    for k in range(4):
        write_tensors(tmp_path / f"{k}.safetensors", tensors, metadata)
    assert len({(tmp_path / f"{k}.safetensors").read_bytes() for k in range(4)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as stored:
        assert stored.metadata() == metadata
        assert torch.equal(stored.get_tensor("b"), tensors["b"])


def test_atomic_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, 1)

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_digests_follow_content_and_are_cached(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = digest_files([file], tmp_path / "cache.json")
    assert digest_files([file], tmp_path / "cache.json") == first == digest_files([file], None)
    file.write_text("two!")
    assert digest_files([file], tmp_path / "cache.json") != first
