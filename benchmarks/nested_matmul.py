"""Products with nested weights on a GPU, beside other kernels: microseconds, and how near the memory ceiling.

    python benchmarks/nested_matmul.py                       writes benchmarks/results/nested_matmul.csv and .png
    python benchmarks/nested_matmul.py --providers pmpd cublas-fp16 --shapes 4096x4096
    python benchmarks/nested_matmul.py --again               ours alone, one more run in results/nested_matmul_runs.csv
    python benchmarks/nested_matmul.py --figure              the figure, and docs/kernels.md's tables; needs no GPU

Each time is of one CUDA graph that runs the operation over many weight buffers, so that nothing stays in the L2 cache,
divided by the number of buffers; launch gaps inside the graph count. Median, 20th and 80th percentile of the replays.
Weights and inputs are random. The ceiling is a device-to-device copy, bytes read and written.

Peers are timed if their packages are installed, and named when they are not: `any-precision` (the extension
any_precision_ext of github.com/fwtan/any-precision-llm), `anybcq` (custom_kernel of github.com/naver-aics/anybcq,
group 128, the zero fill of its output included), `humming` (humming-kernels, symmetric integers), `gemlite` (integers,
group 128, its own tuning for the GPU), `torchao` (Int4WeightOnlyConfig, bfloat16, group 128), `torch-int4` (PyTorch's
own _weight_int4pack_mm, the same).
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from product_tables import write_page
from products import RESULTS, ROWS, RUNS, SHAPES, Case, Table, append_run, cases, draw, report, shape

ROTATED_BYTES = 200e6
"""Weights that a graph goes through: four times an H100's L2 cache."""
REPLAYS = 100
GROUP = 128

Call = Callable[[int], Any]


def buffers(case: Case) -> int:
    """Weights that a graph goes through."""
    return max(3, math.ceil(ROTATED_BYTES / case.weight_bytes))


def inputs(case: Case, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(case.m, case.in_features, device="cuda", dtype=dtype)


def words(case: Case, *shape: int) -> torch.Tensor:
    """Random, of every buffer."""
    return torch.randint(-(2**31), 2**31 - 1, (buffers(case), *shape), dtype=torch.int32, device="cuda")


def pmpd_weights(case: Case) -> list[Any]:
    from pmpd.kernels.device import BYTE_BITS, DeviceWeight

    tiles, shape = -(-case.out_features // 16), (case.out_features, case.in_features)
    packed = words(case, tiles * case.in_features * case.bits // 2)
    # Random bytes below 128 are digits of every precision.
    tables = torch.randint(0, 128, (buffers(case), tiles, 1, 16, 2 << case.bits), dtype=torch.uint8, device="cuda")
    scales = torch.rand(buffers(case), 16 * tiles, 2, device="cuda")
    tables_of_bytes = tables[..., :4].contiguous()
    return [
        DeviceWeight(
            packed[i],
            {case.bits: tables[i]},
            {case.bits: scales[i]},
            (tables_of_bytes[i], scales[i]) if case.bits == BYTE_BITS else None,
            *shape,
            None,
            torch.float16,
        )
        for i in range(buffers(case))
    ]


def pmpd(case: Case) -> Call:
    from pmpd.kernels import cuda

    weights, x = pmpd_weights(case), inputs(case)
    out = torch.empty(case.m, case.out_features, device="cuda", dtype=torch.float16)
    return lambda i: cuda.matmul(x, weights[i], case.bits, out=out)


def any_precision(case: Case) -> Call:
    extension = importlib.import_module("any_precision_ext")
    planes = words(case, case.bits, case.out_features, case.in_features // 32)
    tables = torch.randn(buffers(case), case.out_features, 1 << case.bits, device="cuda", dtype=torch.float16)
    x = inputs(case)
    return lambda i: extension.matmul_kbit(x, planes[i], tables[i], case.bits)


def anybcq(case: Case) -> Call:
    extension = importlib.import_module("custom_kernel")
    planes = words(case, case.in_features // 32, case.bits, case.out_features)
    groups = case.in_features // GROUP
    alpha = torch.randn(buffers(case), groups, case.bits, case.out_features, device="cuda", dtype=torch.float16)
    bias = torch.randn(buffers(case), groups, case.out_features, device="cuda", dtype=torch.float16)
    x, out = inputs(case)[None], torch.empty(1, 1, case.out_features, device="cuda", dtype=torch.float16)

    def call(i: int) -> None:
        out.zero_()
        extension.anybcq_gemv(x, out, planes[i], alpha[i], bias[i], case.bits, case.bits, GROUP)

    return call


def torch_int4(case: Case) -> Call:
    codes = torch.randint(0, 256, (case.out_features, case.in_features // 2), dtype=torch.uint8, device="cuda")
    packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(buffers(case))]
    shape = (buffers(case), case.in_features // GROUP, case.out_features, 2)
    scales = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x = inputs(case, torch.bfloat16)
    return lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i], GROUP, scales[i])


def torchao(case: Case) -> Call:
    quantization = importlib.import_module("torchao.quantization")
    config = quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    layers = []
    for _ in range(buffers(case)):
        shape = (case.in_features, case.out_features)
        layers.append(torch.nn.Linear(*shape, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False))
        quantization.quantize_(layers[-1], config)
    x = inputs(case, torch.bfloat16)
    return lambda i: layers[i](x)


def gemlite(case: Case) -> Call:
    helper = importlib.import_module("gemlite.helper")
    layers = []
    for _ in range(buffers(case)):
        codes = torch.randint(
            0, 1 << case.bits, (case.out_features, case.in_features), device="cuda", dtype=torch.uint8
        )
        scales, zeros = torch.rand(2, codes.numel() // GROUP, 1, device="cuda", dtype=torch.float16)
        packer = helper.A16Wn(device="cuda:0", dtype=torch.float16)
        layers.append(packer.from_weights(codes, scales, zeros, case.bits, GROUP))
    x = inputs(case)
    return lambda i: layers[i](x)


def humming(case: Case) -> Call:
    layer_class = importlib.import_module("humming.layer").HummingLayer
    layers, weight = [], torch.randn(case.out_features, case.in_features, device="cuda", dtype=torch.float16)
    for _ in range(buffers(case)):
        layer = layer_class(
            shape_n=case.out_features,
            shape_k=case.in_features,
            weight_config={"dtype": f"int{case.bits}"},
            torch_dtype=torch.float16,
        ).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    x = inputs(case)
    return lambda i: layers[i](x)


def cublas_fp16(case: Case) -> Call:
    shape = (buffers(case), case.out_features, case.in_features)
    weights = torch.randn(shape, device="cuda", dtype=torch.float16)
    x = inputs(case)
    return lambda i: x @ weights[i].T


PROVIDERS: dict[str, tuple[Callable[[Case], Call], tuple[int, ...], tuple[int, ...]]] = {
    # name: (how, bits, rows of x)
    "pmpd": (pmpd, (2, 3, 4, 5, 6, 8), ROWS),
    "any-precision": (any_precision, (2, 3, 4, 5, 6, 8), ROWS),
    "anybcq": (anybcq, (2, 3, 4), (1,)),
    "torch-int4": (torch_int4, (4,), ROWS),
    "cublas-fp16": (cublas_fp16, (16,), ROWS),
    "humming": (humming, (2, 3, 4), (1,)),
    "gemlite": (gemlite, (2, 4), (1,)),
    "torchao": (torchao, (4,), (1,)),
}


def replay_us(call: Call, buffers: int, replays: int = REPLAYS) -> list[float]:
    """Microseconds a call, of each replay of a graph with one call a buffer."""
    for i in range(3):
        call(i % buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(buffers):
            call(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / buffers)
    return times


def copy_bytes_a_second() -> list[float]:
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [2e6 * source.numel() / us for us in replay_us(lambda i: target.copy_(source), 4)]


def summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}


def measure(providers: list[str], shapes: list[tuple[int, int]], commit: str, path: Path) -> None:
    """Put rows into ``path`` as they come; it keeps those of other providers and products."""
    from pmpd.hardware.gpu import other_processes

    if others := other_processes():
        print(f"{others} other processes use this GPU: times are of all of them", flush=True)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    record = {"gpu": torch.cuda.get_device_name(), "versions": versions, "commit": commit}
    table = Table(path)
    rate = {key: value / 1e9 for key, value in summary(copy_bytes_a_second()).items()}
    table.put(record | {"op": "copy", "provider": "device-to-device", "unit": "GB/s"} | rounded(rate))
    for name in providers:
        how, bits, rows = PROVIDERS[name]
        for case in cases(shapes, bits, rows):
            try:
                call = how(case)
            except ImportError as error:
                print(f"{name}: not installed ({error})", flush=True)
                break
            time = summary(replay_us(call, buffers(case)))
            table.put(record | {"op": "nested_matmul", "provider": name, "unit": "us"} | vars(case) | rounded(time))
            print(f"{name} {case} {time['median']:.2f} us", flush=True)
            del call


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="as 4096x11008; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to record, where there is no repository")
    parser.add_argument("--again", action="store_true", help="time all shapes of ours once more, into --runs")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    if args.again and (args.providers, args.shapes, args.results) != (list(PROVIDERS), SHAPES, RESULTS):
        parser.error("--again is a run of all shapes of ours: leave out --providers, --shapes and --results")
    if not args.figure:
        if not torch.cuda.is_available():
            parser.error("times are of a GPU, and PyTorch sees none; --figure needs none")
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = args.commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        if args.again:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run.csv"
                measure(["pmpd"], SHAPES, commit, run)
                report(run)
                append_run(run, args.runs)
        else:
            measure(args.providers, args.shapes, commit, args.results)
    report(args.results)
    draw(args.results)
    if args.results == RESULTS:
        write_page(args.results)


if __name__ == "__main__":
    main()
