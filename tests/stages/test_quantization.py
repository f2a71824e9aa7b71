from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmpd.models import LazyWeights, attach, linear_names, load_model
from pmpd.quant import NestedWeight, quantize_jointly, quantize_weight
from pmpd.stages.base import RuntimeConfig, read_summary
from pmpd.stages.calibration import MomentsConfig, by_block, run_moments, shard
from pmpd.stages.quantization import QuantizeConfig, QuantizeJointConfig, run_quantize, run_quantize_joint
from pmpd.stages.tuning import TuneTablesConfig, run_tune_tables
from tests.tiny import FAMILIES, tiny_model_dir


def test_an_error_counts_the_chosen_power_of_its_sensitivity(tmp_path: Path, tiny_llama: Path) -> None:
    statistics, out = tmp_path / "sensitivity", tmp_path / "nested"
    statistics.mkdir()
    out.mkdir()
    weights = LazyWeights(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    sensitivities = {}
    for block, names in by_block(linear_names(tiny_llama, False)).items():
        own = {n: torch.rand(weights.weight(n).shape, generator=generator) ** 4 for n in names}
        save_file(own, statistics / shard(block))
        sensitivities |= own
    inputs = {"model": tiny_llama, "sensitivity": statistics}
    run_quantize(QuantizeConfig(2, 3, None, "exact", 0.5, False), inputs, out)
    tensors = {k: v for file in sorted(out.glob("block_*.safetensors")) for k, v in load_file(file).items()}
    for name, sensitivity in sensitivities.items():
        expected = quantize_weight(weights.weight(name).float(), sensitivity.sqrt(), seed_bits=2, parent_bits=3)
        found = NestedWeight.from_tensors(tensors, name)
        assert torch.equal(found.planes, expected.planes)


def test_the_joint_stage_takes_layers_one_by_one_and_keeps_blocks_that_are_done(
    tmp_path: Path, tiny_llama: Path
) -> None:
    statistics, out = tmp_path / "moments", tmp_path / "nested"
    statistics.mkdir()
    out.mkdir()
    weights = LazyWeights(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    blocks = by_block(linear_names(tiny_llama, False))
    moments = {}
    for block, names in blocks.items():
        inputs = {n: torch.randn(200, weights.weight(n).shape[1], generator=generator) for n in names}
        own = {n: x.T @ x for n, x in inputs.items()}
        save_file(own, statistics / shard(block))
        moments |= own
    inputs = {"model": tiny_llama, "moments": statistics}
    config = QuantizeJointConfig(2, 4, None, 4, 0.25, 0.01, 3, 2, 0.0, "cpu", False)
    run_quantize_joint(config, inputs, out)
    for block, names in blocks.items():
        tensors = load_file(out / shard(block))
        for name in names:
            expected = quantize_jointly(weights.weight(name).float(), moments[name], parent_bits=4)
            assert torch.equal(NestedWeight.from_tensors(tensors, name).planes, expected.planes)
    first, last = (out / shard(block) for block in (min(blocks), max(blocks)))
    assert first != last
    written, made = first.stat().st_mtime_ns, last.read_bytes()
    last.unlink()
    run_quantize_joint(config, inputs, out)  # as after a kill in the last block
    assert first.stat().st_mtime_ns == written
    assert last.read_bytes() == made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantised_jointly_and_tuned(tmp_path: Path, family: str) -> None:
    """Moments, joint quantiser and tuning one after another; each further bit brings the model nearer to itself."""
    inputs = {name: tmp_path / name for name in ("texts", "moments", "nested", "tuned")}
    for folder in inputs.values():
        folder.mkdir()
    inputs["model"] = tiny_model_dir(tmp_path / "model", family)
    windows = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, inputs["texts"] / "windows.safetensors")
    runtime = RuntimeConfig("float32", "cpu")
    run_moments(MomentsConfig(runtime), inputs, inputs["moments"])
    config = QuantizeJointConfig(2, 4, None, 4, 0.25, 0.01, 3, 2, 0.0, "cpu", False)
    run_quantize_joint(config, inputs, inputs["nested"])
    run_tune_tables(TuneTablesConfig([2], 4, 0.02, 4, runtime), inputs, inputs["tuned"])
    metrics = read_summary(inputs["tuned"])["metrics"]
    assert metrics["divergence_2_last"] < metrics["divergence_2_first"]

    model = load_model(inputs["model"], torch.float32)
    with torch.no_grad():
        wanted = model(input_ids=windows).logits
        cell = attach(model, inputs["tuned"])
        errors = []
        for bits in (2, 3, 4):
            cell.bits = bits
            errors.append(float((model(input_ids=windows).logits - wanted).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] / 4
