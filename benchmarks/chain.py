"""The blocks of a model in a chain on a GPU, without head and sampling: microseconds a block.

    python benchmarks/chain.py                        writes benchmarks/results/chain.csv

Products that are timed alone (``nested_matmul.py``) do not say how they do beside each other: a kernel starts while
its predecessor ends, and which processors it finds free decides how long it takes; ``launches.py --chain`` looks for
launches that do well here. Weights are random, of the models' true shapes, different for every block; batch 1; medians
over replays of one CUDA graph.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, commit_here, shape

from pmpd.decode import prefill
from pmpd.decode.llama_step import LlamaStep
from pmpd.decode.random import random_llama
from pmpd.hardware.gpu import other_processes
from pmpd.kernels import launch, product
from pmpd.kernels.launch import Launch
from pmpd.kernels.product import Fused, Operand, multiply

RESULTS = Path(__file__).parent / "results" / "chain.csv"
PRODUCTS = ("qkv", "output", "gate_up", "down")
REPLAYS = 20


class Chain:
    """The blocks of one random model, on one row of x."""

    def __init__(self, name: str, bits: list[int], context: int) -> None:
        self.model, cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
        assert cell is not None
        cell.prepare(bits[0])
        self.step = LlamaStep(self.model)
        prompt = torch.randint(3, 32000, (context,)).tolist()
        self.state = prefill(self.model, cell, [prompt], bits[0], max_new_tokens=2)
        self.step.bind(self.state)
        self.start = torch.randn_like(self.step.hidden[:1])
        first = self.model.blocks[0]
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in _layers(first).items()}
        self.processors = product.describe(torch.cuda.current_device()).processors

    def launches(self, bits: int) -> dict[str, Launch]:
        """Those that a model's step has."""
        return {
            name: launch.choose(*sizes, bits, 1, self.processors, chain=True) for name, sizes in self.shapes.items()
        }

    def run(self, bits: int, launches: dict[str, Launch]) -> None:
        """Queue all blocks, as :meth:`LlamaStep.run` does."""
        step, eps = self.step, self.model.eps
        hidden, qkv, attended, gated = (b[:1] for b in (step.hidden, step.qkv, step.attended, step.gated))
        hidden.copy_(self.start)
        for index, block in enumerate(self.model.blocks):
            parts = {name: Operand.of(layer.packed, bits) for name, layer in _layers(block).items()}
            multiply(hidden, parts["qkv"], Fused(block.input_norm, eps), qkv, launches["qkv"])
            step.kernels.attend(qkv, block.qkv_bias, step.turns, step.counters, index, step.scale, attended)
            multiply(attended, parts["output"], Fused(residual=hidden), hidden, launches["output"])
            multiply(hidden, parts["gate_up"], Fused(block.mlp_norm, eps, True), gated, launches["gate_up"])
            multiply(gated, parts["down"], Fused(residual=hidden), hidden, launches["down"])

    def times_us(self, bits: int, launches: dict[str, Launch]) -> list[float]:
        """Microseconds a block of each replay, one after the other without a pause."""
        self.run(bits, launches)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(bits, launches)
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        blocks = len(self.model.blocks)
        return [1e3 * a.elapsed_time(b) / blocks for a, b in itertools.pairwise(events)]


def _layers(block: Any) -> dict[str, Any]:
    return {name: getattr(block, name) for name in PRODUCTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="falling")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--commit", help="that this code is of; default: what git says")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("times are of a GPU, and PyTorch sees none")
    if others := other_processes():
        sys.stderr.write(f"{others} other processes use this GPU: times are of all of them\n")
    rows = []
    for name in args.models:
        chain = Chain(name, args.bits, args.context)
        for bits in args.bits:
            cuts = statistics.quantiles(chain.times_us(bits, chain.launches(bits)), n=10)
            rows.append(
                {
                    **{"op": "block", "provider": "pmpd", "model": name, "bits": bits, "m": 1, "context": args.context},
                    **{"unit": "us", "median": f"{cuts[4]:.5g}", "p20": f"{cuts[1]:.5g}", "p80": f"{cuts[7]:.5g}"},
                    "gpu": torch.cuda.get_device_name(),
                    "versions": f"torch {torch.__version__} cuda {torch.version.cuda}",
                    "commit": args.commit or commit_here(),
                }
            )
            sys.stdout.write(f"{name:12} {bits} bits {cuts[4]:8.2f} us a block\n")
    if rows:
        with args.out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
