"""Quantisers of one fixed precision beside the nested ones: GPTQ and AutoRound, as llmcompressor makes them.

    pip install llmcompressor==0.14.0.1            not a dependency of this project; any version whose needs fit ours
    python benchmarks/quantiser_peers.py --data-root DIR --device cuda
    python benchmarks/quantiser_peers.py --data-root DIR --device cuda --methods gptq --bits 3 --groups 96 --symmetric

Calibration, layers and windows are ``quantisers.py``'s; the rows go to its table. A weight is measured as its integer
times its scale rounded to float16, and must be one of the 2^bits values that its group can have. *True bits* are the
integers, a float16 scale a row and group of columns and, unless symmetric, a zero point of as many bits as an integer.
AutoRound tunes roundings and ranges block by block against the 16-bit block's output, 200 steps each.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quantisers import RESULTS, Bench, Table, measured, parser, peak_gib
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pmpd.models import block_linears, load_model
from pmpd.records import FP16_BITS

AUTOROUND_STEPS = 200
MAX_OFF_GRID = 0.02  # of a step


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
    spread = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    codes = (weight / spread).round()
    off = float((weight / spread - codes).abs().max())
    first, last = codes.unflatten(1, (scale.shape[1], -1)).aminmax(dim=2)
    half = 2 ** (bits - 1)
    if symmetric:
        fits = first.min() >= -half and last.max() < half
    else:
        fits = (last.clamp_min(0) - first.clamp_max(0)).max() < 2 * half
    if off > MAX_OFF_GRID or not fits or scale.shape[1] != (weight.shape[1] // group if group else 1):
        raise ValueError(f"weights are not {bits}-bit integers times {tuple(scale.shape)} scales ({off:.3f} steps off)")
    return codes * scale.half().float().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def quantize(bench: Bench, method: str, weights: dict[str, Any], windows: Tensor) -> Any:
    """The model with its blocks' linear layers quantised."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = load_model(bench.model_folder, torch.float32, "cpu")  # the library places the blocks
    options = {"config_groups": {"blocks": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "gptq":
        recipe: Any = GPTQModifier(**options)
        loader = DataLoader([{"input_ids": w} for w in windows], batch_size=8)
    else:
        recipe = AutoRoundModifier(**options, iters=AUTOROUND_STEPS, enable_torch_compile=False)
        loader = DataLoader([{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in windows], batch_size=1)
    oneshot(model=model, dataset=loader, recipe=recipe, processor=bench.tokenizer, num_calibration_samples=len(windows))
    return model


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--methods", nargs="+", default=["gptq", "autoround"], choices=["gptq", "autoround"])
    arguments.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    arguments.add_argument("--groups", nargs="+", type=int, default=[64, 96, 192], help="columns a scale; 0: one a row")
    arguments.add_argument("--symmetric", action="store_true", help="integers about zero, no zero points")
    arguments.add_argument("--observer", help="how GPTQ finds ranges, memoryless_mse say; without, as the library does")
    args = arguments.parse_args()
    version = importlib.metadata.version("llmcompressor")
    kind = ("sym" if args.symmetric else "asym") + (f"-{args.observer}" if args.observer else "")
    table = Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for seed, method, group, bits in itertools.product(args.seeds, args.methods, args.groups, args.bits):
            name = f"{method}-{group or 'row'}-{kind}"
            if (name, str(seed)) in table.done:
                continue
            weights = {"num_bits": bits, "type": "int", "symmetric": args.symmetric}
            weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
            if args.observer:
                weights["observer"] = args.observer
            first = seed * args.calibration_windows
            windows = bench.calibration[first : first + args.calibration_windows]
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            made = block_linears(quantize(bench, method, weights, windows))
            quantise_s, peak = time.perf_counter() - start, peak_gib(args.device)
            model = bench.model()
            layers = block_linears(model)
            for path, layer in layers.items():
                layer.weight.data = dense(made[path], bits, group, args.symmetric, args.device)
            read = true_bits(layers.values(), bits, group, args.symmetric)
            prompts = seed == args.seeds[0]
            for corpus, value, agreement in measured(bench, model, None, FP16_BITS, prompts):
                table.add(name, f"llmcompressor={version}", bits, read, corpus, value, args.windows, seed, agreement,
                          round(quantise_s, 1), round(peak, 2))  # fmt: skip


if __name__ == "__main__":
    main()
