"""The stage that refits tables: what it changes, and where it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmpd.artifacts import write_tensors
from pmpd.models import block_linears, load_model
from pmpd.quant import NestedWeight, quantize_weight
from pmpd.stages.base import read_summary, write_summary
from pmpd.stages.calibration import by_block, shard
from pmpd.stages.quantization import RefitTablesConfig, run_refit_tables
from tests.quant.test_joint import row_losses

CONFIG = RefitTablesConfig(steps=4, damping=0.01, device="cpu")


@pytest.fixture
def inputs(tiny_llama: Path, tmp_path: Path) -> dict[str, Path]:
    """A model quantised by plain k-means, and moments of correlated inputs."""
    nested, moments = tmp_path / "nested", tmp_path / "moments"
    nested.mkdir()
    moments.mkdir()
    layers = block_linears(load_model(tiny_llama, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for block, names in by_block(layers).items():
        tensors, own = {}, {}
        for name in names:
            weight = layers[name].weight.detach()
            tensors |= quantize_weight(weight, torch.ones_like(weight), parent_bits=4).to_tensors(name)
            inputs = torch.randn(50, weight.shape[1], generator=generator)
            own[name] = inputs.T @ inputs
        write_tensors(nested / shard(block), tensors)
        write_tensors(moments / shard(block), own)
    write_summary(nested, {"num_blocks": 2})
    return {"model": tiny_llama, "nested": nested, "moments": moments}


def test_every_layer_loses_less_and_keeps_its_codes(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run_refit_tables(CONFIG, inputs, out)
    assert read_summary(out) == read_summary(inputs["nested"])
    layers = block_linears(load_model(inputs["model"], torch.float32))
    for block, names in by_block(layers).items():
        folders = (inputs["nested"], out, inputs["moments"])
        before, after, moments = (load_file(folder / shard(block)) for folder in folders)
        assert before.keys() == after.keys()
        for name in names:
            old, new = (NestedWeight.from_tensors(tensors, name) for tensors in (before, after))
            assert torch.equal(old.planes, new.planes)
            for bits in (2, 3, 4):
                was, now = (
                    row_losses(layers[name].weight.detach(), w.dequantize(bits, torch.float32), moments[name])
                    for w in (old, new)
                )
                assert now.sum() < 0.95 * was.sum()


def test_a_killed_run_goes_on_at_its_block(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = {name: torch.zeros_like(t) for name, t in load_file(inputs["nested"] / shard(0)).items()}
    write_tensors(out / shard(0), done)
    run_refit_tables(CONFIG, inputs, out)
    assert not any(tensor.any() for tensor in load_file(out / shard(0)).values())
    assert sorted(file.name for file in out.iterdir()) == [shard(0), shard(1), "summary.json"]
