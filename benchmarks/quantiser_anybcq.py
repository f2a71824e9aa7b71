"""AnyBCQ's method beside ours: bits as signs with scales, each precision's scales its own, blocks reconstructed.

    python benchmarks/quantiser_anybcq.py --data-root DIR --device cuda --checkout ANYBCQ --budget-s 400

``ANYBCQ`` is a checkout of github.com/stevehenny/anybcq, at 8eaac90 here: its quantiser, the order of its stages and
its caches are run as they are; its compiled kernels are not needed. The reconstruction of a block is a loop of our own
of the same step (half of the inputs from the quantised blocks before, squared error of the block's output, Adam at a
rate that falls as a cosine), a CUDA graph on a GPU, with products in TF32: the authors' loop takes 9 to 10 ms a step
for a block of SmolLM2. Their command for Llama-3.1-8B takes 5000 steps a block and precision, of 2 windows of 1024
tokens, at a rate of 1e-4, over 512 windows, 128 columns a scale; here a step has 8 windows of 512 tokens, and there are
as many steps as ``--budget-s`` seconds allow, at the one of ``--rates`` that ends lowest on the first block.
Calibration, layers and windows are ``quantisers.py``'s, and the rows go to its table. *True bits* are the signs and a
float16 scale a sign, row and group of columns.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantiser_bench import RESULTS, Bench, Memory, Table, measured, parser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pmpd.models import block_linears, load_model
from pmpd.quant.joint import fast_products
from pmpd.records import FP16_BITS

PRECISIONS = (2, 3, 4)
BATCH_SIZE = 8
WARM_UP = 3
"""Steps before a capture; they count."""
QUANTISED_INPUTS = 0.5
"""Share of a block's input that comes from the quantised blocks before it, the rest from the original ones."""


class Block(nn.Module):
    """A decoder block under the arguments that AnyBCQ gives it; causal attention needs no mask."""

    def __init__(self, block: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.block, self.rotary = block, [rotary]  # in a list: not the block's own

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **unused: Any) -> Tensor:
        embeddings = self.rotary[0](hidden_states, position_ids)
        return self.block(hidden_states, position_ids=position_ids, position_embeddings=embeddings)


class Stack(nn.Module):
    """The parts of a Llama that AnyBCQ asks for: embedding and blocks."""

    def __init__(self, model: Any, device: str) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()
        self.layers = nn.ModuleList(Block(block, model.model.rotary_emb) for block in model.model.layers)
        self.device = device

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.layers[0](hidden, position_ids=torch.arange(input_ids.shape[1], device=hidden.device)[None])


def reconstruct(block: nn.Module, data: Any, scales: list[nn.Parameter], rate: float, steps: int) -> float:
    """Train ``scales`` so that the block's output is the original's; the mean error of the last quarter of the steps.

    ``data`` is AnyBCQ's cache of activations, at the precision that it is set to.
    """
    batches = list(zip(data.cached_q_input[data.precision], data.cached_fp_input, data.cached_fp_output, strict=True))
    buffers = [torch.empty_like(t, dtype=torch.float32) for t in batches[0]]
    quantised, original, wanted = buffers
    device, num_tokens = wanted.device, wanted.shape[1]
    positions = torch.arange(num_tokens, device=device)[None]
    rate_now = torch.tensor(rate, device=device)
    on_gpu = device.type == "cuda"
    optimiser = torch.optim.Adam(scales, lr=rate_now, capturable=on_gpu, fused=on_gpu or None)
    seen = torch.zeros((), device=device)
    block.requires_grad_(False)
    for scale in scales:
        scale.requires_grad_(True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        mixed = torch.where(torch.rand_like(quantised) < QUANTISED_INPUTS, quantised, original)
        loss = (block(mixed, position_ids=positions) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        seen.add_(loss.detach())

    taken, order = 0, list[int]()
    run: Callable[[], None] = step
    with fast_products(), aside(device):
        while taken < steps:
            if taken == WARM_UP and on_gpu:
                run = captured(step)
            if taken == steps - max(steps // 4, 1):
                seen.zero_()
            order = order or torch.randperm(len(batches)).tolist()
            for buffer, tensor in zip(buffers, batches[order.pop()], strict=True):
                buffer.copy_(tensor)
            rate_now.fill_(rate * (1 + math.cos(math.pi * taken / steps)) / 2)
            run()
            taken += 1
    return float(seen) / max(steps // 4, 1)


@contextlib.contextmanager
def aside(device: torch.device) -> Any:
    """On a stream that is not the default one, as a capture wants its warm-up to be; over when it ends."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        yield
        torch.cuda.synchronize()


def captured(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Plan:
    """How many steps a reconstruction takes, so that all of them end in time, and at which rate."""

    def __init__(self, budget_s: float, most: int, rates: list[float]) -> None:
        self.deadline = time.perf_counter() + budget_s
        self.most, self.rates = most, rates
        self.rate = rates[0]
        self.ended: float | None = None
        self.between_s = 0.0
        self.step_s: list[float] = []
        self.taken: list[int] = []

    def steps(self, calls_left: int) -> int:
        """Of the reconstruction that comes, when ``calls_left`` are to come with it."""
        now = time.perf_counter()
        if self.ended is not None:
            self.between_s = max(0.9 * self.between_s, now - self.ended)
        each_s = (self.deadline - now) / calls_left - self.between_s
        return max(int(min(each_s / max(self.step_s[-len(PRECISIONS) :]), self.most)), WARM_UP + 1)

    def timed(self, steps: int, run: Callable[[int], float]) -> float:
        """What ``run`` returns; its seconds a step, a capture's among them, are counted on for the next."""
        start = time.perf_counter()
        error = run(steps)
        self.ended = time.perf_counter()
        self.step_s.append((self.ended - start) / steps)
        return error


def quantize(checkout: Path, stack: Stack, windows: Tensor, group: int, plan: Plan) -> dict[int, dict[str, Tensor]]:
    """By precision and layer, the dense float32 weights."""
    sys.path.insert(0, str(checkout))
    sys.modules.setdefault("custom_kernel", types.ModuleType("custom_kernel"))  # its compiled kernels
    from anybcq.quantization import anybcq
    from anybcq.quantization.bcq_linear import BCQLinear

    found: dict[int, dict[str, Tensor]] = {bits: {} for bits in PRECISIONS}
    number = 0

    def keep(block: nn.Module) -> None:
        """In place of packing for its kernels."""
        nonlocal number
        for path, layer in block.named_modules():
            if isinstance(layer, BCQLinear):
                for bits, weights in found.items():
                    scales = getattr(layer, f"alpha_{bits}").float().permute(2, 0, 1)  # [rows, groups, bits]
                    dense = torch.einsum("rgb,rgcb->rgc", scales, layer.fpBinary[..., :bits].float())
                    weights[f"model.layers.{number}.{path.removeprefix('block.')}"] = dense.flatten(1)
        number += 1

    def scales_of(block: nn.Module) -> list[nn.Parameter]:
        layers = [layer for layer in block.modules() if isinstance(layer, BCQLinear)]
        scales = [getattr(layer, f"alpha{k}") for layer in layers for k in range(layer.num_bit)]
        for scale in scales:
            scale.data = scale.data.contiguous()  # slices of one tensor, which a fused optimiser does not take
        return scales

    class Planned(anybcq.AnyBCQ):  # type: ignore[misc]
        def blockReconstruction(  # noqa: N802
            self, block: nn.Module, loader: Any, add_bit: int, layer_idx: int, num_layers: int
        ) -> nn.Module:
            def on_a_copy(rate: float, steps: int) -> float:
                own = copy.deepcopy(block)
                return reconstruct(own, loader.dataset, scales_of(own), rate, steps)

            calls_left = len(PRECISIONS) * (num_layers - layer_idx) - add_bit
            if not plan.step_s:
                on_a_copy(plan.rate, WARM_UP + 1)  # loads and compiles
                plan.timed(200, partial(on_a_copy, plan.rate))
                steps = plan.steps(calls_left)
                ends = {rate: plan.timed(steps, partial(on_a_copy, rate)) for rate in plan.rates}
                plan.rate = min(ends, key=lambda rate: ends[rate])
                sys.stderr.write(f"first block at {PRECISIONS[0]} bits, {steps} steps, error by rate: {ends}\n")
                plan.ended = None
            steps = plan.steps(calls_left)
            error = plan.timed(steps, partial(reconstruct, block, loader.dataset, scales_of(block), plan.rate))
            plan.taken.append(steps)
            sys.stderr.write(f"block {layer_idx} +{add_bit} bits: {steps} steps, error {error:.5f}\n")
            with torch.no_grad():  # its copies would keep this stream's graph, which the next capture may not touch
                anybcq.save_alpha_and_beta_in_bcqlinear(block)
            return block

    anybcq.replace_bcq_with_lutgemm = keep
    loader = DataLoader([{"input_ids": window} for window in windows], batch_size=BATCH_SIZE)
    own = Planned(stack, loader, wq_params={"n_bits": PRECISIONS[0], "group_size": group}, aq_params={"n_bits": 16},
                  batch_size=BATCH_SIZE, add_bits=len(PRECISIONS) - 1, input_prob=QUANTISED_INPUTS,
                  num_samples=len(windows), torch_dtype=torch.float16, asymmetric=False, train_beta=False)  # fmt: skip
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):  # it prints every block
        own.minimize()
    return found


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--checkout", type=Path, required=True)
    arguments.add_argument("--group", type=int, default=192, help="columns a scale")
    arguments.add_argument("--steps", type=int, default=5000, help="at most, of a block and precision")
    arguments.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3])
    arguments.add_argument("--budget-s", type=float, default=math.inf, help="seconds of a quantisation")
    args = arguments.parse_args()
    name, table = f"anybcq-{args.group}", Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for seed in (seed for seed in args.seeds if not table.has(name, seed)):
            first = seed * args.calibration_windows
            windows = bench.calibration[first : first + args.calibration_windows]
            torch.manual_seed(seed)
            memory = Memory(args.device)
            stack = Stack(load_model(bench.model_folder, torch.float16, args.device), args.device)
            plan = Plan(args.budget_s, args.steps, args.rates)
            start = time.perf_counter()
            found = quantize(args.checkout, stack, windows, args.group, plan)
            quantise_s, peak = round(time.perf_counter() - start, 1), round(memory.peak_gib(), 2)
            options = f"steps={min(plan.taken)}..{max(plan.taken)} rate={plan.rate}"
            model = bench.model()
            layers = block_linears(model)
            for bits, weights in found.items():
                assert set(weights) == set(layers), set(weights) ^ set(layers)
                for path, layer in layers.items():
                    layer.weight.data = weights[path].to(layer.weight)
                read = bits + 16 * bits / args.group
                table.add([
                    (name, options, bits, read, corpus, value, args.windows, seed, agreement, quantise_s, peak)
                    for corpus, value, agreement in measured(bench, model, None, FP16_BITS)
                ])  # fmt: skip


if __name__ == "__main__":
    main()
