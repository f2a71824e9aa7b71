"""The benchmarks of quantisers, on a tiny model: whose rows they write, and what a peer's weight must be."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Row = dict[str, str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the benchmarks read, under the names that they look for."""
    generator = torch.Generator().manual_seed(0)
    words = ["the", "model", "reads", "a", "prompt", "and", "writes", "an", "answer", "of", "few", "words"]

    def text(length: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator))

    rows = {
        "c4/validation": [{"text": text(700)} for _ in range(12)],
        "wikitext-2-raw-v1/test": [{"text": text(300)}],
        "cnn_dailymail/validation": [{"article": text(30), "highlights": text(8), "id": str(i)} for i in range(4)],
    }
    for name, own in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return tmp_path


@pytest.fixture
def rows_of(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    def run(out: Path, *arguments: object) -> list[Row]:
        monkeypatch.setattr(sys, "argv", ["quantisers.py", *map(str, arguments), "--out", str(out)])
        script("quantisers").main()
        with out.open(encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    return run


def test_every_quantiser_asked_for_has_its_rows_once(
    rows_of: Callable[..., list[Row]],
    script: Callable[[str], ModuleType],
    data: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = script("quantisers").QUANTIZERS
    monkeypatch.setitem(known, "joint-tuned", replace(known["joint-tuned"], tuning=(2, 0.003)))
    asked = ["joint", "joint-tuned", "joint-4-groups"]
    arguments = ["--data-root", data, "--model", tiny_llama, "--seeds", 0, "--windows", 2, "--window-tokens", 32,
                 "--calibration-windows", 2, "--prompts", 2, "--work", data / "work", "--quantizers"]  # fmt: skip
    first = rows_of(data / "rows.csv", *arguments, *asked[:1])
    rows = rows_of(data / "rows.csv", *arguments, *asked)
    assert rows[: len(first)] == first  # kept, and not made again
    keys = [(row["quantizer"], row["bits"], row["corpus"]) for row in rows]
    bits = {"fp16": ["16"], "joint-4-groups": ["2", "3", "4"]}
    corpora = ("c4", "wikitext-2")
    wanted = {(n, b, c) for n in ("fp16", *asked) for b in bits.get(n, ["2", "3", "4", "5", "6", "8"]) for c in corpora}
    assert len(keys) == len(wanted)
    assert set(keys) == wanted
    found = dict(zip(keys, rows, strict=True))
    for b in ("5", "6", "8"):  # tuning leaves them
        for c in corpora:
            assert found["joint-tuned", b, c]["perplexity"] == found["joint", b, c]["perplexity"]
    assert found["joint-tuned", "2", "c4"]["perplexity"] != found["joint", "2", "c4"]["perplexity"]
    assert all(row["agreement"] == "100.0000" for row in rows if row["quantizer"] == "fp16")
    peaks = [float(row["peak_gib"]) for row in rows if row["quantizer"] != "fp16"]
    assert all(0.05 < peak < 50 for peak in peaks), "a process with PyTorch in it, in GiB"


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_peers_weight_is_its_integers_times_float16_scales(
    script: Callable[[str], ModuleType], symmetric: bool
) -> None:
    peers, bits, group = script("quantiser_peers"), 3, 8
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-4, 4, (6, 3, group), generator=generator).double()
    scale = 0.01 + torch.rand(6, 3, 1, generator=generator, dtype=torch.float64) / 10
    layer = nn.Linear(3 * group, 6, bias=False)
    layer.weight.data = (codes * scale).flatten(1).float()
    layer.weight_scale = scale[..., 0].float()
    dense = peers.dense(layer, bits, group, symmetric, "cpu")
    torch.testing.assert_close(dense.double(), (codes * scale.half().double()).flatten(1), rtol=1e-6, atol=0)

    bfloat16 = nn.Linear(3 * group, 6, bias=False)
    bfloat16.weight.data, bfloat16.weight_scale = layer.weight.data.bfloat16(), layer.weight_scale
    assert torch.equal(peers.dense(bfloat16, bits, group, symmetric, "cpu"), dense)

    for change in (0.3 * scale[0, 0, 0], 8 * scale[0, 0, 0]):  # off the grid, or a ninth value
        other = nn.Linear(3 * group, 6, bias=False)
        other.weight.data, other.weight_scale = layer.weight.data.clone(), layer.weight_scale
        other.weight.data[0, 0] += change
        with pytest.raises(ValueError, match="not 3-bit integers times scales of 8 columns"):
            peers.dense(other, bits, group, symmetric, "cpu")


def test_a_peers_true_bits_count_scales_and_zero_points(script: Callable[[str], ModuleType]) -> None:
    peers = script("quantiser_peers")
    layers = [nn.Linear(96, 10), nn.Linear(192, 5)]
    assert peers.true_bits(layers, 3, 96, False) == pytest.approx(3 + 19 / 96)
    assert peers.true_bits(layers, 3, 96, True) == pytest.approx(3 + 16 / 96)
    assert peers.true_bits(layers, 4, 0, True) == pytest.approx(4 + 16 * 15 / (96 * 10 + 192 * 5))


def test_a_blocks_scales_are_trained_to_its_outputs(script: Callable[[str], ModuleType]) -> None:
    """A linear block whose output is wanted at twice its weight: only the scale moves, and it becomes two."""
    anybcq = script("quantiser_anybcq")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.frozen = nn.Parameter(torch.eye(4))

        def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.scale * hidden @ self.frozen

    inputs = list(torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    data = SimpleNamespace(precision=2, cached_fp_input=inputs, cached_q_input={2: inputs},
                           cached_fp_output=[2 * own for own in inputs])  # fmt: skip
    block = Scaled()
    error = anybcq.reconstruct(block, data, [block.scale], 0.05, 200)
    assert block.scale.item() == pytest.approx(2, abs=1e-2)
    assert torch.equal(block.frozen, torch.eye(4))
    assert error < 1e-2


def test_schedules_that_cannot_be_measured_leave_the_results(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    results = tmp_path / "schedules.csv"
    results.write_text("what there was\n", encoding="utf-8")
    arguments = ["--data-root", str(tmp_path / "nowhere"), "--nested", "a=b", "--out", str(results)]
    monkeypatch.setattr(sys, "argv", ["quantiser_schedules.py", *arguments, "--model", str(tiny_llama)])
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        script("quantiser_schedules").main()
    assert [file.read_text(encoding="utf-8") for file in tmp_path.iterdir()] == ["what there was\n"]
