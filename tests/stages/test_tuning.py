"""The stage that tunes tables: what it changes, and where it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmpd.artifacts import write_tensors
from pmpd.models import block_linears, load_model
from pmpd.quant import quantize_weight
from pmpd.stages.base import RuntimeConfig, read_summary, write_summary
from pmpd.stages.tuning import DIVERGENCE, TuneTablesConfig, run_tune_tables

SHARD = "block_000.safetensors"


@pytest.fixture
def inputs(tiny_llama: Path, tmp_path: Path) -> dict[str, Path]:
    nested, texts = tmp_path / "nested", tmp_path / "texts"
    nested.mkdir()
    texts.mkdir()
    tensors = {}
    for name, layer in block_linears(load_model(tiny_llama, torch.float32)).items():
        weight = layer.weight.detach()
        tensors |= quantize_weight(weight, torch.ones_like(weight), parent_bits=4).to_tensors(name)
    write_tensors(nested / SHARD, tensors)
    write_summary(nested, {"num_blocks": 2})
    save_file({"windows": torch.randint(0, 300, (4, 16))}, texts / "windows.safetensors")
    return {"model": tiny_llama, "nested": nested, "texts": texts}


def config(bits: list[int]) -> TuneTablesConfig:
    return TuneTablesConfig(bits, steps=4, rate=0.02, batch_size=4, runtime=RuntimeConfig("float32", "cpu"))


def test_only_the_tables_asked_for_change(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run_tune_tables(config([2, 3]), inputs, out)
    assert sorted(file.name for file in out.iterdir()) == [SHARD, "summary.json"]
    before, after = load_file(inputs["nested"] / SHARD), load_file(out / SHARD)
    assert before.keys() == after.keys()
    for name in before:
        tuned = name.endswith((".centroids.2", ".centroids.3"))
        assert torch.equal(before[name], after[name]) != tuned
        assert before[name].dtype == after[name].dtype
    metrics = read_summary(out)["metrics"]
    assert metrics["num_blocks"] == 2
    assert metrics["divergence_2_last"] < metrics["divergence_2_first"]


def test_a_killed_run_goes_on_at_its_precision(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = {
        n: torch.full_like(t, 0.5) for n, t in load_file(inputs["nested"] / SHARD).items() if n[-12:] == ".centroids.2"
    }
    write_tensors(out / "tables_2.safetensors", done | {DIVERGENCE: torch.ones(4)})
    run_tune_tables(config([2, 3]), inputs, out)
    after = load_file(out / SHARD)
    assert all(torch.equal(after[name], table) for name, table in done.items())
    assert read_summary(out)["metrics"]["divergence_2_first"] == 1
