from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pmpd.models import LazyWeights, linear_names
from pmpd.quant import NestedWeight, quantize_weight
from pmpd.stages.calibration import by_block, shard
from pmpd.stages.quantization import QuantizeConfig, run_quantize


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
