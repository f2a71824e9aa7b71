"""Registers of the programs that products get, and which of them spill. It needs NVRTC (PyTorch's CUDA wheel), no GPU.

    python benchmarks/registers.py                       2 to 8 bits, 1 to 8 rows of x: some ten minutes on two cores
    python benchmarks/registers.py --bits 2 --rows 1 2

A program that spills a few bytes can take a quarter longer (docs/kernels.md), and sweeps see none of those that begin
with a norm or are gated. Launches are those of an H100 (132 processors).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections import defaultdict
from multiprocessing import get_context

import torch
from products import SHAPES, shape

from pmpd.kernels import launch, nvrtc
from pmpd.kernels.product import Fused, Variant

MORE_SHAPES = [(576, 576), (3072, 576), (576, 1536), (6144, 2048), (11264, 2048)]
"""Of SmolLM2 and MobileLLaMA."""
PROCESSORS, SHARED_BYTES = 132, 227 * 1024
WEIGHT = torch.empty(0)
FUSED = {
    "": Fused(),
    "residual": Fused(residual=WEIGHT),
    "norm": Fused(WEIGHT),
    "norm, gated": Fused(WEIGHT, gated=True),
}
OF_PRODUCT = re.compile(
    r"Compiling entry function 'nested_matmul'.*?(\d+) bytes stack frame.*?Used (\d+) registers", re.S
)


def program(bits: int, rows: int, sizes: tuple[int, int], fused: str) -> Variant:
    """What :func:`pmpd.kernels.product.multiply` compiles for such a product."""
    chain = rows == 1 and fused != ""
    plan = launch.choose(*sizes, bits, rows, PROCESSORS, chain=chain)
    plan = launch.fit(plan, bits, *sizes, 1, rows, PROCESSORS, SHARED_BYTES)
    return Variant.of(plan, bits, torch.float16, FUSED[fused], sizes, 1)


def used(variant: Variant, architecture: str) -> tuple[Variant, int, int]:
    """Registers of a thread, and bytes that it spills."""
    _, log = nvrtc.build(variant.source, [*variant.options, "--ptxas-options=-v"], architecture)
    found = OF_PRODUCT.search(log)
    if not found:
        raise RuntimeError(f"this NVRTC says nothing about registers: {log}")
    return variant, int(found[2]), int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=list(range(2, 9)))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES + MORE_SHAPES, help="as 4096x11008")
    parser.add_argument("--architecture", default="sm_90")
    args = parser.parse_args()
    products = defaultdict(list)
    for case in itertools.product(args.bits, args.rows, args.shapes, FUSED):
        products[program(*case)].append(case)
    spilling = 0
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        for variant, registers, stack in pool.starmap(used, [(v, args.architecture) for v in products], chunksize=4):
            if stack:
                spilling += len(products[variant])
                for bits, rows, sizes, fused in products[variant]:
                    product = f"{bits} bits, {rows} rows, {sizes[0]} x {sizes[1]} {fused}".rstrip()
                    print(f"{product}: {stack} bytes spilled beside {registers} registers, {variant}")
    print(f"{spilling} of {sum(map(len, products.values()))} products have a program that spills")


if __name__ == "__main__":
    main()
