"""How long the joint quantiser takes on one block of a large model, a layer at a time.

Random Gaussian weights in the shapes of a Vicuna-7B block (seven layers, 202 M weights), second moments of correlated
inputs whose energies differ as those of real layers do; times are synchronised, the first layer compiles the kernels.

    python benchmarks/quantise_block.py --device cuda
    python benchmarks/quantise_block.py --width 1024 --inner 2752       a smaller block, on a CPU
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from pmpd.quant import JointOptions, quantize_jointly

TOKENS = 8192


def random_layer(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that share an eighth as many factors as there are inputs."""
    device, columns = generator.device, shape[1]
    factors = torch.randn(columns // 8, columns, generator=generator, device=device) / (columns // 8) ** 0.5
    scale = torch.exp(torch.randn(columns, generator=generator, device=device))
    inputs = torch.randn(TOKENS, columns // 8, generator=generator, device=device) @ factors
    inputs = (inputs + 0.5 * torch.randn(TOKENS, columns, generator=generator, device=device)) * scale
    return 0.02 * torch.randn(shape, generator=generator, device=device), inputs.T @ inputs / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parent-bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--high-share", type=float, default=JointOptions.high_share)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    generator = torch.Generator(args.device).manual_seed(0)
    width, inner = args.width, args.inner
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    options = JointOptions(high_share=args.high_share)
    quantize_jointly(*random_layer((64, 128), generator), parent_bits=3, options=options)
    for parent_bits in args.parent_bits:
        for _ in range(args.repeats):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            spent = []
            for shape in shapes:
                weight, moment = random_layer(shape, generator)
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                quantize_jointly(weight, moment, parent_bits=parent_bits, options=options)
                spent.append(time.perf_counter() - start)
            peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
            name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
            layers = " ".join(f"{seconds:.2f}" for seconds in spent)
            sys.stdout.write(
                f"2 to {parent_bits} bits, high_share {args.high_share}: {sum(spent):.2f} s a block "
                f"({layers}){peak}, {name}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
