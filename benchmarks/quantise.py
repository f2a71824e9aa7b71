"""How long the quantiser takes on a model's linear layers, and how long reading them back at each precision does.

Random Gaussian weights and sensitivities in the shapes of SmolLM2-135M (30 blocks, 210 layers, 106 M weights), one
layer in memory at a time, as the quantise stage works:

    python benchmarks/quantise.py
    python benchmarks/quantise.py --blocks 3 --group-size 64

"first call" is the compilation, or the loading of its cache once there is one.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time

import torch

from pmpd.quant import quantize_weight

BLOCK_SHAPES = ((576, 576), (576, 576), (192, 576), (192, 576), (1536, 576), (1536, 576), (576, 1536))
KIB_PER_MIB = 1024


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_MIB


def random_layer(generator: torch.Generator, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a sensitivity spread over orders of magnitude as squared gradients are."""
    return 0.05 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) ** 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--seed-bits", type=int, default=2)
    parser.add_argument("--parent-bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--solver", default="exact", choices=["exact", "lloyd"])
    args = parser.parse_args()
    options = {
        "seed_bits": args.seed_bits,
        "parent_bits": args.parent_bits,
        "group_size": args.group_size,
        "solver": args.solver,
    }
    precisions = range(args.seed_bits, args.parent_bits + 1)
    generator = torch.Generator().manual_seed(0)
    weight, sensitivity = random_layer(generator, (8, 576))
    start_mib = peak_mib()

    start = time.perf_counter()
    quantized = quantize_weight(weight, sensitivity, **options)
    quantized.dequantize(args.seed_bits, torch.float32)
    first_s = time.perf_counter() - start

    quantize_s, num_weights = 0.0, 0
    read_s = dict.fromkeys(precisions, 0.0)
    for _ in range(args.blocks):
        for shape in BLOCK_SHAPES:
            weight, sensitivity = random_layer(generator, shape)
            start = time.perf_counter()
            quantized = quantize_weight(weight, sensitivity, **options)
            quantize_s += time.perf_counter() - start
            num_weights += weight.numel()
            for bits in precisions:
                start = time.perf_counter()
                quantized.dequantize(bits, torch.float32)
                read_s[bits] += time.perf_counter() - start

    rows = [("first call", first_s, None), ("quantise", quantize_s, num_weights)]
    rows += [(f"dequantise, {bits} bits", seconds, num_weights) for bits, seconds in read_s.items()]
    lines = [
        f"{args.blocks * len(BLOCK_SHAPES)} layers, {num_weights / 1e6:.1f} M weights, {precisions[0]} to "
        f"{precisions[-1]} bits, group_size {args.group_size}, solver {args.solver}, {os.cpu_count()} CPU cores",
        f"{'':<20} {'seconds':>8} {'M weights/s':>12}",
    ]
    for name, seconds, count in rows:
        lines.append(f"{name:<20} {seconds:>8.2f} {'' if count is None else f'{count / seconds / 1e6:.1f}':>12}")
    lines.append(f"peak memory {peak_mib():.0f} MiB, of which {start_mib:.0f} MiB before the first call")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
