"""The benchmarks of quantisers, on a tiny model: whose rows they write, and what a peer's weight must be."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from torch import nn

from pmpd.models import block_linears, load_model
from tests.tiny import HEADS, tiny_model_dir

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


Tensors = dict[str, tuple[np.ndarray, GGMLQuantizationType | None]]
Q3_K, Q4_0 = GGMLQuantizationType.Q3_K, GGMLQuantizationType.Q4_0
GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
              "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


def gguf_name(path: str) -> str:
    return f"blk.{path.split('.')[2]}.{GGUF_NAMES[path.rpartition('.')[2]]}.weight"


def write_gguf(file: Path, tensors: Tensors) -> None:
    """Tensors as they are, or bytes as blocks of a type."""
    writer = GGUFWriter(file, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_ggufs_order(path: str, weight: torch.Tensor, kv_heads: int) -> np.ndarray:
    """Rows i and i + half of a head of queries or keys stand beside each other in a GGUF."""
    heads = {"q_proj": HEADS, "k_proj": kv_heads}.get(path.rpartition(".")[2])
    rows = list(range(len(weight)))
    if heads:
        half = len(weight) // heads // 2
        rows = [head * 2 * half + j * half + i for head in range(heads) for i in range(half) for j in range(2)]
    return weight[rows].numpy().astype(np.float32)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama's folder, and its linear layers, embedding and one norm in a GGUF."""
    folder = tiny_model_dir(tmp_path, "llama_gqa", dtype=torch.float16)
    model = load_model(folder, torch.float32, "cpu")
    matrices = {gguf_name(path): in_ggufs_order(path, layer.weight.detach(), 2)
                for path, layer in block_linears(model).items()}  # fmt: skip
    matrices["token_embd.weight"] = model.get_input_embeddings().weight.detach().numpy()
    norm = np.arange(64, dtype=np.float32)
    write_gguf(tmp_path / "tiny.gguf", {"blk.0.attn_norm.weight": (norm, None), **asis(matrices)})
    return folder, tmp_path / "tiny.gguf"


def asis(tensors: dict[str, np.ndarray]) -> Tensors:
    return {name: (data, None) for name, data in tensors.items()}


@pytest.mark.parametrize("flat", [False, True])
def test_a_ggufs_layers_come_back_as_the_models(
    script: Callable[[str], ModuleType], tiny_gguf: tuple[Path, Path], tmp_path: Path, flat: bool
) -> None:
    llamacpp, (folder, file) = script("quantiser_llamacpp"), tiny_gguf
    model, out = load_model(folder, torch.float32, "cpu"), tmp_path / "out.gguf"
    llamacpp.rewrite(file, out, lambda tensor: llamacpp.in_float16(tensor, flat))
    layers = llamacpp.read_layers(out, model)
    for path, linear in block_linears(model).items():
        assert torch.equal(layers[path].weight, linear.weight), path
    assert llamacpp.true_bits(layers) == 16
    read = GGUFReader(out)
    columns = {tensor.name: int(tensor.shape[0]) for tensor in read.tensors}
    assert columns["blk.1.ffn_up.weight"] == (256 if flat else 64)
    assert columns["blk.1.ffn_down.weight"] == (768 if flat else 96)
    assert columns["token_embd.weight"] == columns["blk.0.attn_norm.weight"] == 64
    assert read.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


def test_true_bits_of_a_gguf_are_its_blocks_bytes(
    script: Callable[[str], ModuleType], tiny_gguf: tuple[Path, Path], tmp_path: Path
) -> None:
    """Random bytes are blocks of Q3_K too, 110 of them for 256 weights; below 124 their scales are finite."""
    llamacpp, (folder, _) = script("quantiser_llamacpp"), tiny_gguf
    model, generator, file = load_model(folder, torch.float32, "cpu"), np.random.default_rng(0), tmp_path / "k.gguf"
    linears = block_linears(model)
    blocks = {gguf_name(path): generator.integers(0, 124, (layer.weight.numel() // 256, 110), dtype=np.uint8)
              for path, layer in linears.items()}  # fmt: skip
    tensors: Tensors = {name: (data, Q3_K) for name, data in blocks.items()}
    write_gguf(file, tensors)
    layers = llamacpp.read_layers(file, model)
    assert llamacpp.true_bits(layers) == pytest.approx(8 * 110 / 256)
    assert {layer.type for layer in layers.values()} == {"Q3_K"}
    for path in linears:
        rows = dequantize(blocks[gguf_name(path)], Q3_K).reshape(layers[path].weight.shape)
        np.testing.assert_array_equal(in_ggufs_order(path, layers[path].weight, 2), rows)

    path, last = list(linears.items())[-1]
    size, weights = last.weight.numel(), sum(layer.weight.numel() for layer in linears.values())
    tensors[gguf_name(path)] = quantize(last.weight.detach().numpy(), Q4_0), Q4_0  # 18 bytes for 32 weights
    write_gguf(file, tensors)
    wanted = 8 * ((weights - size) * 110 / 256 + size * 18 / 32) / weights
    assert llamacpp.true_bits(llamacpp.read_layers(file, model)) == pytest.approx(wanted)

    del tensors[gguf_name(path)]
    write_gguf(file, tensors)
    with pytest.raises(ValueError, match=f"has no {gguf_name(path)} of"):
        llamacpp.read_layers(file, model)


class LlamaCpp:
    """In place of the tools: all matrices as Q4_0; sums of squares that are their column's number."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self.count, self.calls = count, list[str]()

    def run(self, tool: Path, *arguments: object) -> None:
        given = [str(argument) for argument in arguments]
        options = dict(itertools.pairwise(given))
        self.calls.append(tool.name)
        if tool.name == "llama-imatrix":
            self.imatrix(Path(options["-m"]), Path(options["-f"]), Path(options["-o"]))
        else:
            *_, source, out, self.type = given
            self.quantize(Path(source), Path(out), options.get("--imatrix"))

    def imatrix(self, model: Path, text: Path, out: Path) -> None:
        sums = dict[str, np.ndarray]()
        for name, columns in widths(model).items():
            sums[f"{name}.in_sum2"] = np.arange(columns, dtype=np.float32)[None]
            sums[f"{name}.counts"] = np.full((1, 1), self.count(text.read_text(encoding="utf-8")), dtype=np.float32)
        write_gguf(out, asis(sums))

    def quantize(self, source: Path, out: Path, imatrix: str | None) -> None:
        found = {tensor.name: tensor.data for tensor in GGUFReader(imatrix).tensors} if imatrix else {}
        for name, columns in widths(source).items() if imatrix else ():
            width = 96 if "ffn_down" in name else 64
            assert found[f"{name}.in_sum2"].tolist() == [list(range(width)) * (columns // width)]
        write_gguf(out, {t.name: (quantize(t.data.astype(np.float32), Q4_0), Q4_0) if len(t.shape) > 1 else
                         (t.data, None) for t in GGUFReader(source).tensors})  # fmt: skip


def widths(file: Path) -> dict[str, int]:
    """Columns of the matrices of blocks."""
    tensors = GGUFReader(file).tensors
    return {t.name: int(t.shape[0]) for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1}


def test_llamacpps_rows_are_of_what_its_tools_made(
    script: Callable[[str], ModuleType],
    data: Path,
    tiny_gguf: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llamacpp, (folder, file) = script("quantiser_llamacpp"), tiny_gguf
    tokenizer = script("quantiser_bench").load_tokenizer(folder)
    tools = LlamaCpp(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    shutil.copytree(folder, data / "work" / "model")  # a real GGUF carries its tokenizer and is converted
    monkeypatch.setattr(llamacpp, "run", tools.run)

    def rows() -> list[Row]:
        arguments = ["--data-root", data, "--model", file, "--seeds", 0, "--windows", 2, "--window-tokens", 32,
                     "--calibration-windows", 2, "--prompts", 0, "--work", data / "work", "--tools", "bin", "--bits", 3,
                     "--mixes", "k-m", "--kinds", "plain", "flat-imatrix", "--out", data / "rows.csv"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["quantiser_llamacpp.py", *map(str, arguments)])
        llamacpp.main()
        with (data / "rows.csv").open(encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    first = rows()
    assert tools.calls == ["llama-quantize", "llama-imatrix", "llama-quantize"]
    names = ["llamacpp-k-m", "llamacpp-k-m-flat-imatrix"]
    assert [(row["quantizer"], row["corpus"]) for row in first] == [(n, c) for n in names for c in ("c4", "wikitext-2")]
    assert {(row["bits"], row["true_bits"], row["options"]) for row in first} == {("3", "4.5000", "Q3_K_M: 21 Q4_0")}
    assert first[0]["perplexity"] == first[2]["perplexity"]  # Q4_0 has blocks of 32 columns, flat or not
    assert rows() == first
    assert len(tools.calls) == 3

    tools.count = lambda text: 1000
    (data / "work" / "imatrix-0.gguf").unlink()
    (data / "work" / "imatrix-0-flat.gguf").unlink()
    (data / "rows.csv").unlink()
    with pytest.raises(ValueError, match="llama-imatrix read 1000 tokens of 1024"):
        rows()

    tensors = {tensor.name: tensor.data.copy() for tensor in GGUFReader(file).tensors}
    tensors["blk.1.attn_v.weight"][3, 5] += 1
    write_gguf(file, asis(tensors))
    (data / "work" / "float16.gguf").unlink()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj of .* in float16 is not the 16-bit model's"):
        rows()
