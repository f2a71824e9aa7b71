"""Quantisers of one fixed precision beside the nested ones: GPTQ and AutoRound, as llmcompressor makes them.

    pip install llmcompressor==0.14.0.1 auto-round==0.15.1                no dependency of this project
    python benchmarks/quantiser_peers.py --data-root DIR --device cuda --seeds 0 --prompts 0
    python benchmarks/quantiser_peers.py --data-root DIR --device cuda --bits 3 --groups 96 --kinds asym-mse
    python benchmarks/quantiser_peers.py --data-root DIR --device cuda --method autoround --kinds asym

Calibration, layers and windows are ``quantisers.py``'s, and the rows go to its table. A weight is measured as its
integer times its scale rounded to float16, and must be one of the 2^bits values that its group can have. *True bits*
are the integers, a float16 scale a row and group of columns and, unless symmetric, a zero point of as many bits as an
integer. All else is the library's choice, for GPTQ damping 0.01, columns by falling activation, inputs from blocks
already quantised; for AutoRound 200 steps a block.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantiser_bench import RESULTS, Bench, Memory, Table, measured, parser, share
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pmpd.models import block_linears, load_model
from pmpd.records import FP16_BITS

# Range of a group: its least and greatest weight, or the one of least squared error.
KINDS: dict[str, dict[str, Any]] = {
    "asym": {"symmetric": False},
    "sym": {"symmetric": True},
    "asym-mse": {"symmetric": False, "observer": "memoryless_mse"},
}
MAX_OFF_GRID = 0.05  # of a step: weights that went through bfloat16, as AutoRound's, are rounded by 0.02


def true_bits(layers: Iterable[nn.Linear], bits: int, group: int, symmetric: bool) -> float:
    """Mean over the weights of all layers; a group of 0 is a whole row."""
    shapes = [layer.weight.shape for layer in layers]
    groups = sum(rows * columns / (group or columns) for rows, columns in shapes)
    return bits + groups * (16 + (0 if symmetric else bits)) / sum(rows * columns for rows, columns in shapes)


def dense(layer: Any, bits: int, group: int, symmetric: bool, device: str) -> Tensor:
    """float32 ``[rows, columns]`` of a quantised layer, its scales rounded to float16.

    Raises:
        ValueError: a weight that is off its group's grid, or a group of more than ``2 ** bits`` values.
    """
    weight, scale = (t.detach().to(device).float() for t in (layer.weight, layer.weight_scale))
    width = weight.shape[1] // scale.shape[1]
    steps = weight / scale.repeat_interleave(width, dim=1)
    codes = steps.round()
    off = float((steps - codes).abs().max())
    first, last = codes.unflatten(1, (-1, width)).aminmax(dim=2)
    half = 2 ** (bits - 1)
    if symmetric:
        fits = first.min() >= -half and last.max() < half
    else:
        fits = (last.clamp_min(0) - first.clamp_max(0)).max() < 2 * half
    if off > MAX_OFF_GRID or not fits or width != (group or weight.shape[1]):
        raise ValueError(f"not {bits}-bit integers times scales of {group or 'all'} columns: {off:.3f} steps off")
    return codes * scale.half().float().repeat_interleave(width, dim=1)


def quantize(bench: Bench, method: str, weights: dict[str, Any], windows: Tensor) -> Any:
    """The model with its blocks' linear layers quantised."""
    from llmcompressor import oneshot

    model = load_model(bench.model_folder, torch.float32, "cpu")  # the library places the blocks
    layers: dict[str, Any] = {
        "config_groups": {"blocks": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    rows = [{"input_ids": window} for window in windows]
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        recipe, loader = GPTQModifier(**layers), DataLoader(rows, batch_size=8)
    else:
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        recipe = AutoRoundModifier(**layers, iters=bench.args.autoround_steps, enable_torch_compile=False)
        loader = DataLoader([row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows], batch_size=1)
    oneshot(model=model, dataset=loader, recipe=recipe, processor=bench.tokenizer, num_calibration_samples=len(windows))
    return model


def measure(bench: Bench, table: Table, name: str, bits: int, group: int, kind: str, seed: int) -> None:
    args = bench.args
    weights = {"num_bits": bits, "type": "int", **KINDS[kind]}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    first = seed * args.calibration_windows
    windows = bench.calibration[first : first + args.calibration_windows]
    memory, start = Memory(args.device), time.perf_counter()
    made = block_linears(quantize(bench, args.method, weights, windows))
    quantise_s, peak = round(time.perf_counter() - start, 1), round(memory.peak_gib(), 2)
    model, symmetric = bench.model(), KINDS[kind]["symmetric"]
    layers = block_linears(model)
    for path, layer in layers.items():
        layer.weight.data = dense(made[path], bits, group, symmetric, args.device)
    read = true_bits(layers.values(), bits, group, symmetric)
    library = "llmcompressor" if args.method == "gptq" else "auto-round"
    options = f"{library}={importlib.metadata.version(library)}"
    table.add([
        (name, options, bits, read, corpus, value, args.windows, seed, agreement, quantise_s, peak)
        for corpus, value, agreement in measured(bench, model, None, FP16_BITS)
    ])  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--method", choices=["gptq", "autoround"], default="gptq")
    arguments.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    arguments.add_argument("--groups", nargs="+", type=int, default=[64, 96], help="columns a scale; 0: one a row")
    arguments.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    arguments.add_argument("--autoround-steps", type=int, default=200, help="a block")
    args = arguments.parse_args()
    table = Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for group, kind, bits, seed in itertools.product(args.groups, args.kinds, args.bits, args.seeds):
            name = f"{args.method}-{group or 'row'}-{kind}"
            share(bench, f"{name}-{bits}-{seed}", partial(table.has, name, seed, bits),
                  partial(measure, bench, table, name, bits, group, kind, seed))  # fmt: skip


if __name__ == "__main__":
    main()
