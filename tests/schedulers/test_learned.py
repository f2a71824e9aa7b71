from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd.records import Prefill, class_schedules
from pmpd.schedulers import KVPooler, Learned, LearnedNetwork, load_network, save_network


def network(seed: int = 0, **shape: Any) -> LearnedNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LearnedNetwork(**{"kv_heads": 2, "head_dim": 8, "num_classes": 4} | shape).eval()


def kv(length: int, batch: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, length, 8, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_pooling_is_attention_of_one_query_a_head_over_normalised_keys() -> None:
    pooler = KVPooler(2, 8)
    torch.nn.init.normal_(pooler.query)
    keys, values = kv(5)
    pooled_keys, pooled_values = pooler(keys, values, torch.tensor([[True, True, True, True, False]]))
    for head in range(2):
        normal = [(k - k.mean()) / math.sqrt(float(k.var(correction=0)) + 1e-5) for k in keys[0, head, :4].double()]
        weights = torch.stack([k @ pooler.query[head].double() / math.sqrt(8) for k in normal]).exp()
        weights = weights / weights.sum()
        for pooled, rows in ((pooled_keys, normal), (pooled_values, values[0, head, :4].double())):
            expected = sum(w * row for w, row in zip(weights, rows, strict=True))
            torch.testing.assert_close(pooled[0, 8 * head : 8 * head + 8].double(), expected, rtol=0, atol=1e-5)


def test_padding_changes_nothing() -> None:
    net, (keys, values) = network(), kv(5)
    padded = [torch.cat([x, 50 * torch.ones(1, 2, 3, 8)], 2) for x in (keys, values)]
    mask = torch.arange(8)[None] < 5
    torch.testing.assert_close(net(*padded, mask), net(keys, values), rtol=0, atol=1e-5)
    assert not torch.allclose(net(*padded), net(keys, values), atol=1e-3)


def test_statistics_are_those_of_all_positions_and_channels_at_once() -> None:
    hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # blocks, length
    activations = torch.stack([hidden.mean(1), hidden.var(1, correction=0)], 1)[None].float()
    net = network(features=["all_statistics"], num_layers=3, hidden_size=16)
    seen: list[Tensor] = []
    net.norms["all_statistics"].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    net(*kv(5), activations=activations)
    mean, variance = hidden.flatten(1).mean(1), hidden.flatten(1).var(1, correction=0)
    torch.testing.assert_close(seen[0][0].double(), torch.cat([mean, variance.log()]), rtol=0, atol=1e-4)


def test_activations_that_are_missing_or_another_models_are_refused() -> None:
    net = network(features=["kv", "last_mean"], num_layers=3, hidden_size=16)
    assert Learned(net, 4, class_schedules(4, (4, 3), 30)).reads_activations
    for activations in (None, torch.zeros(1, 2, 2, 16)):
        with pytest.raises(ValueError, match=r"activations are .* trained for \(3, 2, 16\)"):
            net(*kv(5), activations=activations)
    with pytest.raises(ValueError, match="each once"):
        network(features=["kv", "kv"])


def test_half_precision_features_are_computed_in_float32() -> None:
    net, (keys, values) = network(), kv(5)
    halves = [(100 * x).half() for x in (keys, values)]
    logits = net(*halves)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, net(*(x.float() for x in halves)))


@pytest.mark.parametrize("shape", [(1, 3, 5, 8), (1, 2, 5, 4)])
def test_features_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"keys have .* trained for 2 of 8"):
        network()(torch.zeros(shape), torch.zeros(shape))


def test_the_network_is_small_for_small_models() -> None:
    assert LearnedNetwork(3, 64, 4).num_parameters < 20_000
    assert LearnedNetwork(32, 128, 4).num_parameters < 300_000


def test_the_class_with_the_largest_logit_is_chosen() -> None:
    net, classes = network(), class_schedules(4, (4, 3), 30)
    scheduler = Learned(net, 4, classes)
    assert scheduler.prefill_bits == 4
    seen = set()
    for seed in range(40):
        keys, values = kv(6, seed=seed)
        policy = scheduler.begin(Prefill(keys[0], values[0], torch.zeros(3), 30))
        assert policy.schedule == classes[int(net(keys, values).argmax())]
        seen.add(policy.schedule)
    assert len(seen) > 1


def test_a_network_in_training_mode_is_set_to_decide() -> None:
    net = network().train()
    scheduler = Learned(net, 4, class_schedules(4, (4, 3), 30))
    assert not scheduler.network.training


def test_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10 classes given, the network was trained for 4"):
        Learned(network(), 4, class_schedules(4, (4, 3, 2), 30))
    with pytest.raises(ValueError, match="prefill_bits=3"):
        Learned(network(), 3, class_schedules(4, (4, 3), 30))


def test_a_saved_network_gives_equal_logits(tmp_path: Path) -> None:
    net = network(hidden=16)
    save_network(net, tmp_path / "a.safetensors")
    loaded = load_network(tmp_path / "a.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(*kv(7)), net(*kv(7)))
    assert not torch.equal(loaded(*kv(7)), network(seed=1, hidden=16)(*kv(7)))


def test_a_file_that_is_no_scheduler_is_refused_by_name(tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"weights\.safetensors holds no learned scheduler"):
        load_network(other)
    other.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a readable safetensors file"):
        load_network(other)


def test_tensors_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_network(network(), path)
    tensors = load_file(path)
    tensors["output.weight"] = torch.zeros(3, 32)
    del tensors["key_norm.bias"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"key_norm\.bias: missing, .*output\.weight: \[3, 32\], expected \[4, 32\]"):
        load_network(path)
    metadata["format"] = "1"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="format 1, this version reads 2"):
        load_network(path)
