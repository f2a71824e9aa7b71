"""The two searches as rules over scores, and what their windows could have shown."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import t

from pmpd.artifacts import write_tensors
from pmpd.models import block_linears, load_model
from pmpd.quant import quantize_weight
from pmpd.stages.base import RuntimeConfig, read_summary, write_summary
from pmpd.stages.search import SearchConfig, cheapest_pair, lowest_lossless, power, run_search


@pytest.mark.parametrize(
    ("curve", "tolerance", "expected"),
    [
        ({16: 10.0, 4: 10.2, 3: 10.5, 2: 30.0}, 0.05, 3),
        ({16: 10.0, 4: 10.2, 3: 10.51, 2: 30.0}, 0.05, 4),
        ({16: 10.0, 4: 11.0, 3: 10.1, 2: 30.0}, 0.05, None),
        ({16: 10.0, 5: 10.1, 4: 11.0, 3: 10.1}, 0.05, 5),
        ({16: 10.0, 4: float("nan")}, 0.05, None),
        ({16: 10.0, 4: 9.9}, 0.0, 4),
    ],
)
def test_lowest_lossless_is_the_last_before_the_first_lossy(curve, tolerance, expected):
    assert lowest_lossless(curve, tolerance) == expected


def brute_force(precisions, score, limit):
    pairs = [(p, d) for p in precisions for d in precisions if p >= d and score(p, d) <= limit]
    return min(pairs, key=lambda pair: (pair[1], pair[0]), default=None)


@pytest.mark.parametrize("limit", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 9.0])
def test_cheapest_pair_is_that_of_an_exhaustive_search_when_quality_is_monotone(limit):
    precisions = range(2, 9)

    def score(prefill, decode):
        return 4.0 / prefill + 6.0 / decode

    pair, scores = cheapest_pair(precisions, score, limit)
    assert pair == brute_force(precisions, score, limit)
    assert len(scores) <= 2 * len(precisions)
    assert all(prefill >= decode for prefill, decode in scores)


def test_no_pair_when_the_highest_misses():
    assert cheapest_pair([2, 3], lambda p, d: 10.0, 1.0)[0] is None


def detectable(differences):
    """The smallest rise that a paired t test of these differences of nats shows with a power of 0.8, as a share."""
    n = len(differences)
    quantiles = t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)
    return math.expm1(quantiles * np.std(differences, ddof=1) / math.sqrt(n))


def test_power_is_that_of_the_paired_differences_of_nats():
    rng = np.random.default_rng(0)
    hard = rng.normal(3.0, 0.5, (64, 1))  # windows differ far more than precisions do
    fp16 = hard + rng.normal(0, 0.3, (64, 100))
    own = fp16 + rng.normal(0.02, 0.03, (64, 1))
    shown = power(torch.from_numpy(own), torch.from_numpy(fp16))
    differences = (own - fp16).mean(1)
    rise = math.expm1(differences.mean())
    assert shown["n"] == 64
    assert shown["detectable_rise"] == pytest.approx(detectable(differences), rel=0.06)
    half = math.expm1(t.ppf(0.975, 63) * np.std(differences, ddof=1) / 8)
    assert shown["relative_low"] == pytest.approx(rise - half, abs=0.15 * half)
    assert shown["relative_high"] == pytest.approx(rise + half, abs=0.15 * half)
    alone = detectable(own.mean(1))
    assert shown["detectable_rise"] < alone / 10


def test_fp16_differs_from_itself_by_nothing_and_a_broken_precision_has_no_power():
    nll = torch.rand(8, 10, dtype=torch.float64)
    names = ("relative_low", "relative_high", "detectable_rise")
    assert [power(nll, nll)[name] for name in names] == [0, 0, 0]
    broken = nll.clone()
    broken[3, 2] = math.inf
    assert all(math.isnan(power(broken, nll)[name]) for name in names)


def test_one_window_shows_nothing():
    one = torch.rand(1, 10, dtype=torch.float64)
    assert power(one, one + 1)["detectable_rise"] == math.inf


def test_the_record_has_the_power_of_every_precision_and_the_nats_that_it_is_of(tiny_llama, tmp_path):
    inputs = {"model": tiny_llama, "nested": tmp_path / "nested", "texts": tmp_path / "texts"}
    tensors = {}
    for name, layer in block_linears(load_model(tiny_llama, torch.float32)).items():
        weight = layer.weight.detach()
        tensors |= quantize_weight(weight, torch.ones_like(weight), parent_bits=4).to_tensors(name)
    for folder in ("nested", "texts", "out"):
        (tmp_path / folder).mkdir()
    write_tensors(inputs["nested"] / "block_000.safetensors", tensors)
    write_summary(inputs["nested"], {"num_blocks": 2})
    windows = torch.randint(0, 300, (12, 16), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, inputs["texts"] / "windows.safetensors")
    run_search(SearchConfig(2, 4, 0.5, RuntimeConfig("float32", "cpu")), inputs, tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    nats = {b: np.array([row[f"{b} bits"] for row in summary["tables"]["nats"]]) for b in (2, 3, 4, 16)}
    curve = {row["bits"]: row for row in summary["curves"]["perplexity"]}
    assert curve.keys() == nats.keys()
    for bits, row in curve.items():
        assert row["n"] == len(nats[bits]) == 12
        assert row["perplexity"] == pytest.approx(math.exp(nats[bits].mean()), rel=1e-9)
        assert row["relative"] == pytest.approx(math.expm1((nats[bits] - nats[16]).mean()), rel=1e-6, abs=1e-9)
        assert row["detectable_rise"] == pytest.approx(detectable(nats[bits] - nats[16]), rel=0.1)
    lossless = summary["metrics"]["lowest_lossless_bits"]
    assert lossless is not None
    assert summary["metrics"]["detectable_rise"] == max(curve[b]["detectable_rise"] for b in range(lossless, 5))
    pairs = summary["curves"]["pairs"]
    assert all(row["detectable_rise"] > 0 and row["n"] == 12 for row in pairs)
