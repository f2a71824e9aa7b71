"""Nested quantisers beside each other on one model: perplexity, agreement with 16 bits, true bits, time, memory.

    python benchmarks/quantisers.py --data-root DIR                                all, three calibration seeds
    python benchmarks/quantisers.py --data-root DIR --quantizers anyprec joint --seeds 0 --windows 12 --prompts 0
    python benchmarks/quantisers.py --data-root DIR --device cuda --keep nested    leaves nested models there
    for i in 1 2 3; do python benchmarks/quantisers.py --data-root DIR --work DIR --out FILE & done    shared out

Texts, windows and agreement are ``quantiser_bench.py``'s. *True bits* are what a step at that precision reads a weight:
planes, that precision's tables, outliers. *quantise_s* is the quantiser alone, tuning included, statistics not;
*peak_gib* is its memory, beside a GPU the GPU's, so none for k-means, which works on the CPU. A quantiser's rows of a
seed are added together, and those that the file has are kept. Precisions that tuning leaves as they are have the rows
of what was tuned.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quantiser_bench import RESULTS, Bench, Found, Memory, Table, measured, parser, share
from safetensors.torch import load_file

from pmpd.models import attach
from pmpd.quant import NestedWeight
from pmpd.records import FP16_BITS
from pmpd.stages.base import RuntimeConfig
from pmpd.stages.quantization import (
    QuantizeConfig,
    QuantizeJointConfig,
    RefitTablesConfig,
    run_quantize,
    run_quantize_joint,
    run_refit_tables,
)
from pmpd.stages.tuning import TuneTablesConfig, run_tune_tables

BITS = (2, 3, 4, 5, 6, 8)
TUNED_BITS = (2, 3, 4)
JOINT = {"focus_bits": 4, "high_share": 0.25, "damping": 0.01, "refits": 3, "sweeps": 2, "outlier_share": 0.0}


@dataclass(frozen=True)
class Quantizer:
    """Attributes:
    kind: anyprec or joint.
    options: of its config, beside the defaults.
    parent_bits: the highest precision that it makes.
    tuning: steps and rate of tuning up to 4 bits, if any.
    base: what is tuned, or else refitted.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    parent_bits: int = 8
    tuning: tuple[int, float] | None = None
    group_size: int | None = None
    base: str | None = None

    def describe(self) -> str:
        parts = [f"{k}={v}" for k, v in self.options.items()] + [f"parent_bits={self.parent_bits}"]
        if self.group_size:
            parts.append(f"group_size={self.group_size}")
        if self.tuning:
            parts.append(f"tuning_steps={self.tuning[0]} tuning_rate={self.tuning[1]}")
        return " ".join(parts)


TUNED = (64, 0.003)
REFITTED = {"solver": "exact", "refits": 3}
QUANTIZERS: dict[str, Quantizer] = {
    "anyprec": Quantizer("anyprec", {"solver": "lloyd"}),
    "anyprec-exact": Quantizer("anyprec", {"solver": "exact"}),
    "anyprec-exact-0.75": Quantizer("anyprec", {"solver": "exact", "sensitivity_power": 0.75}),
    "anyprec-exact-tuned": Quantizer("anyprec", {"solver": "exact"}, tuning=TUNED, base="anyprec-exact"),
    "anyprec-exact-refit": Quantizer("anyprec", REFITTED, base="anyprec-exact"),
    "anyprec-exact-refit-tuned": Quantizer("anyprec", REFITTED, tuning=TUNED, base="anyprec-exact-refit"),
    "joint": Quantizer("joint"),
    "joint-tuned": Quantizer("joint", tuning=TUNED, base="joint"),
    "joint-4": Quantizer("joint", {}, 4),
    "joint-4-tuned": Quantizer("joint", {}, 4, TUNED, base="joint-4"),
    "joint-4-outliers": Quantizer("joint", {"outlier_share": 0.005}, 4),
    "joint-4-outliers-tuned": Quantizer("joint", {"outlier_share": 0.005}, 4, TUNED, base="joint-4-outliers"),
    "joint-4-groups": Quantizer("joint", {}, 4, group_size=192),
}


@dataclass(frozen=True)
class Spent:
    seconds: float
    peak_gib: float


def quantize(name: str, inputs: dict[str, Path], folder: Callable[[str], Path], device: str) -> Spent:
    """Quantise into ``folder(name)``, from its base's result if it has one; what was spent, on the base too."""
    quantizer, out = QUANTIZERS[name], folder(name)
    file = out / "spent.json"
    if file.exists():
        return Spent(**json.loads(file.read_text(encoding="utf-8")))
    before = quantize(quantizer.base, inputs, folder, device) if quantizer.base else Spent(0.0, 0.0)
    if out.exists():  # of a killed run: resumed, its seconds would be too few
        shutil.rmtree(out)
    out.mkdir(parents=True)
    memory, start = Memory(device), time.perf_counter()
    untuned = folder(quantizer.base) if quantizer.base else out if not quantizer.tuning else out / "untuned"
    if not quantizer.base:
        untuned.mkdir(exist_ok=True)
        common = (2, quantizer.parent_bits, quantizer.group_size)
        if quantizer.kind == "anyprec":
            power = quantizer.options.get("sensitivity_power", 1.0)
            run_quantize(QuantizeConfig(*common, quantizer.options["solver"], power, False), inputs, untuned)
        else:
            options = {**JOINT, **quantizer.options, "device": device, "trust_remote_code": False}
            run_quantize_joint(QuantizeJointConfig(*common, **options), inputs, untuned)
    if quantizer.tuning:
        steps, rate = quantizer.tuning
        config = TuneTablesConfig(list(TUNED_BITS), steps, rate, 4, RuntimeConfig("float32", device))
        run_tune_tables(config, {**inputs, "nested": untuned}, out)
    elif quantizer.base:
        refit = RefitTablesConfig(quantizer.options["refits"], JOINT["damping"], device)
        run_refit_tables(refit, {**inputs, "nested": untuned}, out)
    seconds = time.perf_counter() - start
    spent = Spent(before.seconds + seconds, max(before.peak_gib, memory.peak_gib()))
    file.write_text(json.dumps(asdict(spent)), encoding="utf-8")
    return spent


def true_bits(folder: Path) -> dict[int, float]:
    """By precision of :data:`BITS`, the mean over the weights of all layers."""
    read, weights = dict.fromkeys(BITS, 0.0), 0
    for file in sorted(folder.glob("block_*.safetensors")):
        tensors = load_file(file)
        for name in {k.removesuffix(".planes") for k in tensors if k.endswith(".planes")}:
            weight = NestedWeight.from_tensors(tensors, name)
            count = weight.out_features * weight.in_features
            weights += count
            read = {b: r + count * weight.true_bits(b) if b in weight.centroids else 0 for b, r in read.items()}
    return {bits: total / weights for bits, total in read.items() if total}


def chains(names: list[str]) -> list[list[str]]:
    """``names`` in lists that begin with one made from nothing else in them, and go on with what is made from it."""
    found: list[list[str]] = []
    for name in names:
        own = next((chain for chain in found if QUANTIZERS[name].base in chain), None)
        if own is None:
            found.append([name])
        else:
            own.append(name)
    return found


def measure_chain(bench: Bench, table: Table, names: list[str], seed: int) -> None:
    """Quantise and measure what the table lacks of ``names``."""
    args, seen = bench.args, dict[tuple[str | None, int], Found]()
    inputs = bench.statistics(seed)

    def folder(name: str) -> Path:
        return Path(args.keep or bench.work) / f"{name}-{seed}"

    for name in (name for name in names if not table.has(name, seed)):
        quantizer = QUANTIZERS[name]
        spent = quantize(name, inputs, folder, args.device)
        quantise_s, peak = round(spent.seconds, 1), round(spent.peak_gib, 2)
        model = bench.model()
        cell = attach(model, folder(name))
        rows: list[tuple[Any, ...]] = []
        for bits, read in true_bits(folder(name)).items():
            if quantizer.tuning and bits not in TUNED_BITS and (quantizer.base, bits) in seen:
                found = seen[quantizer.base, bits]
            else:
                found = measured(bench, model, cell, bits)
                cell.drop(bits)
            seen[name, bits] = found
            rows += [
                (name, quantizer.describe(), bits, read, corpus, value, args.windows, seed, agreement, quantise_s, peak)
                for corpus, value, agreement in found
            ]
        table.add(rows)


def has_all(table: Table, names: list[str], seed: int) -> bool:
    return all(table.has(name, seed) for name in names)


def measure_fp16(bench: Bench, table: Table) -> None:
    found = measured(bench, bench.model(), None, FP16_BITS)
    table.add([("fp16", "", FP16_BITS, 16.0, c, v, bench.args.windows, "", a, None, None) for c, v, a in found])


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    arguments.add_argument("--keep", type=Path, help="a folder for the nested models")
    args = arguments.parse_args()
    table = Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))

        for seed, names in itertools.product(args.seeds, chains(args.quantizers)):
            share(bench, f"{names[0]}-{seed}", partial(has_all, table, names, seed),
                  partial(measure_chain, bench, table, names, seed))  # fmt: skip
        share(bench, "fp16", partial(table.has, "fp16", ""), partial(measure_fp16, bench, table))


if __name__ == "__main__":
    main()
