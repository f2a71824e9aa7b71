"""llama.cpp's K quantisers beside ours: its own tools on a GGUF of the model, what they made read back and measured.

    cmake -S llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release && cmake --build BUILD -t llama-quantize llama-imatrix
    python benchmarks/quantiser_llamacpp.py --data-root DIR --tools BUILD/bin --seeds 0 --prompts 0

The model is a Llama and comes as a GGUF, whose weights in float16 are the 16-bit model's. Blocks of K types have 256
columns. Where a row is no multiple of that, llama-quantize falls back to types of 32 columns and more bits; kinds of
*flat* give it such matrices with rows end to end, so that blocks run on into the next row: the bits that wide models
have, in a file that llama.cpp would not run. Kinds of *imatrix* weigh columns by the mean squares that llama-imatrix
finds on ``quantisers.py``'s calibration. Layers and windows are ``quantisers.py``'s too, and the rows go to its table;
the embedding, which llama-quantize shrinks as well, stays at 16 bits. *True bits* are the bytes of the layers' blocks,
*options* how many layers have which type, *quantise_s* is llama-quantize's.
"""

from __future__ import annotations

import collections
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    QK_K,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    ReaderTensor,
    dequantize,
    get_tensor_name_map,
)
from quantiser_bench import RESULTS, Bench, Table, measured, parser, share
from torch import Tensor

from pmpd.models import block_linears, resolve
from pmpd.records import FP16_BITS

MIXES = {
    "k-s": {2: "Q2_K_S", 3: "Q3_K_S", 4: "Q4_K_S"},
    "k-m": {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M"},
}
"""llama-quantize's names, by mix and nominal bits."""
KINDS = ("plain", "imatrix", "flat", "flat-imatrix")
SUMS, COUNTS = ".in_sum2", ".counts"
"""What llama-imatrix calls a layer's sums of squared inputs, and the number of tokens in them."""


@dataclass(frozen=True)
class Layer:
    """Attributes:
    weight: float32 ``[rows, columns]``.
    type: of its blocks.
    num_bytes: of its blocks, scales included.
    """

    weight: Tensor
    type: str
    num_bytes: int


def read_layers(file: Path, model: Any) -> dict[str, Layer]:
    """The linear layers of ``model``'s blocks as a GGUF file has them, flat or not, by module path.

    Raises:
        ValueError: a layer that the file lacks, or has in another size.
    """
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    layers = {}
    for path, linear in block_linears(model).items():
        name = f"{names.get_name(path)}.weight"
        tensor = tensors.get(name)
        if tensor is None or tensor.n_elements != linear.weight.numel():
            raise ValueError(f"{file} has no {name} of {tuple(linear.weight.shape)}: it is another model's")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(linear.weight.shape)
        if own_heads := heads.get(path.rpartition(".")[2]):  # a rotated pair stands side by side there
            weight = weight.unflatten(0, (own_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        layers[path] = Layer(weight, tensor.tensor_type.name, int(tensor.n_bytes))
    return layers


def true_bits(layers: dict[str, Layer]) -> float:
    """Mean over the weights of all layers."""
    return 8 * sum(layer.num_bytes for layer in layers.values()) / sum(own.weight.numel() for own in layers.values())


def rows_end_to_end(columns: int) -> int:
    """As few rows as make a multiple of a K type's block."""
    return QK_K // math.gcd(columns, QK_K)


def rewrite(source: Path, out: Path, change: Callable[[ReaderTensor], np.ndarray]) -> None:
    """A GGUF file with the keys of ``source``, but its file type, and ``change`` of each tensor."""
    reader = GGUFReader(source)
    architecture = reader.fields.get(Keys.General.ARCHITECTURE)
    writer = GGUFWriter(out, architecture.contents() if architecture else "none")  # an importance matrix has none
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, change(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_float16(tensor: ReaderTensor, flat: bool) -> np.ndarray:
    """A matrix in float16, of a block with rows end to end if ``flat``; a vector in float32."""
    data = dequantize(tensor.data, tensor.tensor_type)
    if data.ndim == 1:
        return data
    if flat and tensor.name.startswith("blk."):
        data = data.reshape(-1, rows_end_to_end(data.shape[1]) * data.shape[1])
    return data.astype(np.float16)


def flat_sums(tensor: ReaderTensor) -> np.ndarray:
    """Of an importance matrix, a layer's sums once for every row that stands in a line of the flat file."""
    tiled = tensor.name.startswith("blk.") and tensor.name.endswith(SUMS)
    return np.tile(tensor.data, rows_end_to_end(tensor.data.shape[-1])) if tiled else tensor.data


def write_imatrix(tools: Path, model: Path, text: str, windows: Tensor, out: Path) -> None:
    """llama-imatrix's of ``text``, which is ``windows`` as text.

    Raises:
        ValueError: it read other tokens than there are.
    """
    file = out.with_suffix(".txt")
    file.write_text(text, encoding="utf-8")
    run(tools / "llama-imatrix", "-m", model, "-f", file, "-o", out, "-c", windows.shape[1], "--parse-special")
    counts = {int(t.data.item()) for t in GGUFReader(out).tensors if t.name.endswith(COUNTS)}
    if counts != {windows.numel()}:
        read = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"llama-imatrix read {read} tokens of {windows.numel()}: its tokenizer is not the model's")


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


class Sources:
    """What llama-quantize reads, made once a work folder."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.gguf = resolve(bench.args.model).files[0]
        if self.gguf.suffix != ".gguf":
            raise ValueError(f"--model {bench.args.model}: llama.cpp's tools read a GGUF, give one")

    def float16(self, flat: bool) -> Path:
        """Raises:
        ValueError: its weights are not those of the 16-bit model.
        """
        file = self.bench.work / f"float16{'-flat' if flat else ''}.gguf"
        if not file.exists():
            part = file.with_suffix(".part")
            rewrite(self.gguf, part, partial(in_float16, flat=flat))
            model = self.bench.model()
            linears = block_linears(model)
            for path, layer in read_layers(part, model).items():
                if not torch.equal(layer.weight, linears[path].weight.cpu()):
                    raise ValueError(f"{path} of {self.gguf} in float16 is not the 16-bit model's")
            part.rename(file)
        return file

    def imatrix(self, seed: int, flat: bool) -> Path:
        args, plain = self.bench.args, self.bench.work / f"imatrix-{seed}.gguf"
        if not plain.exists():
            first = seed * args.calibration_windows
            windows = self.bench.calibration[first : first + args.calibration_windows]
            part = plain.with_suffix(".part.gguf")
            text = self.bench.tokenizer.decode(windows.flatten(), clean_up_tokenization_spaces=False)
            write_imatrix(args.tools, self.float16(False), text, windows, part)
            part.rename(plain)
        file = plain.with_stem(f"{plain.stem}-flat") if flat else plain
        if not file.exists():
            rewrite(plain, file, flat_sums)
        return file


def measure(bench: Bench, table: Table, name: str, mix: str, kind: str, bits: int, seed: int) -> None:
    args, sources = bench.args, Sources(bench)
    flat = kind.startswith("flat")
    options = ["--imatrix", sources.imatrix(seed, flat)] if kind.endswith("imatrix") else []
    source, made = sources.float16(flat), bench.work / f"{name}-{bits}-{seed}.gguf"
    start = time.perf_counter()
    run(args.tools / "llama-quantize", *options, source, made, MIXES[mix][bits])
    quantise_s = round(time.perf_counter() - start, 1)
    model = bench.model()
    layers = read_layers(made, model)
    for path, linear in block_linears(model).items():
        linear.weight.data = layers[path].weight.to(linear.weight)
    types = collections.Counter(layer.type for layer in layers.values())
    said = f"{MIXES[mix][bits]}: " + " ".join(f"{count} {type_}" for type_, count in types.most_common())
    table.add([
        (name, said, bits, true_bits(layers), corpus, value, args.windows, seed, agreement, quantise_s, None)
        for corpus, value, agreement in measured(bench, model, None, FP16_BITS)
    ])  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--tools", type=Path, required=True, help="the folder with llama-quantize and llama-imatrix")
    arguments.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], choices=MIXES["k-m"])
    arguments.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    arguments.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = arguments.parse_args()
    table = Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for kind, mix, bits in itertools.product(args.kinds, args.mixes, args.bits):
            name = f"llamacpp-{mix}" + (f"-{kind}" if kind != "plain" else "")
            for seed in args.seeds if kind.endswith("imatrix") else args.seeds[:1]:  # others read no calibration
                share(bench, f"{name}-{bits}-{seed}", partial(table.has, name, seed, bits),
                      partial(measure, bench, table, name, mix, kind, bits, seed))  # fmt: skip


if __name__ == "__main__":
    main()
