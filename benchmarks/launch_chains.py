"""The best launches of products in a model's step, beside each other: ``launches.py --chain``.

What counts is the time of a whole step in the decode loop (chain.py), and each try takes longer than that of a product
alone: so a descent changes one choice at a time. It begins with what a step has so far (with look-up alone: with the
best of that), and ends above it by no more than two measurements of the same differ.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from chain import Chain
from launch_choices import (
    QUEUES,
    START,
    TIMES,
    Changes,
    Method,
    Table,
    architecture,
    compile_all,
    divide,
    every,
    fit,
    methods,
    queues,
    times,
)
from products import Case

from pmpd.kernels import launch, product
from pmpd.kernels.launch import Launch

WARPS = {  # (of a block for a tile, teams)
    False: [(2, 4), (4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 2), (11, 1), (16, 1)],
    True: [(1, 4), (2, 2), (2, 4), (4, 1), (4, 2), (6, 1), (7, 1), (8, 1)],
}
MORE_WARPS = [(2, 6), (4, 3), (4, 4), (7, 2), (8, 2), (11, 1), (16, 1)]
"""By planes where registers allow: two bits."""


def axes(bits: int, method: Method, in_features: int) -> list[Changes]:
    """Choices of each axis that a descent goes along."""
    pairs = WARPS[method.planes] + (MORE_WARPS if method.planes and bits == 2 else [])
    return [divide(pairs, method, in_features), queues(QUEUES), times(TIMES)]


@dataclass
class Descent:
    """The way from one launch of a product by one method to a better one, one axis at a time."""

    choices: list[Changes]
    best: Launch
    times: dict[Launch, float] = field(default_factory=dict)

    def step(self, axis: int, time: Callable[[Launch], float]) -> None:
        candidates = [self.best, *(replace(self.best, **change) for change in self.choices[axis])]
        for plan in candidates:
            if plan not in self.times:
                self.times[plan] = time(plan)
        self.best = min(candidates, key=self.times.__getitem__)


def chains(bits: list[int], models: list[str], table: Table) -> None:
    """First with look-up alone, then with planes too: where look-up wins again, beside planes, its row is replaced."""
    gpu = product.describe(torch.cuda.current_device())
    processors = gpu.processors
    for name in models:
        chain = Chain(name, sorted(bits, reverse=True), 512)
        compile_all(chain_variants(chain, bits, gpu), architecture(gpu))
        for b in sorted(bits):
            table.forget_chain(b, [chain.shapes[part] for part in chain.own])
            for planes in (False, True)[: 2 if b <= launch.PLANES_MAX_BITS else 1]:
                for part, plan, us in best_chain(chain, b, processors, planes=planes):
                    table.add(Case(b, 1, *chain.shapes[part]), plan, us, processors, chain=1)


def chain_variants(chain: Chain, bits: list[int], gpu: product.Gpu) -> Iterator[product.Variant]:
    """Of all launches that :func:`best_chain` may try."""
    norm = torch.empty(0)
    fused = {"qkv": product.Fused(norm), "gate_up": product.Fused(norm, gated=True)}
    for part, b in itertools.product(chain.own, bits):
        shape = chain.shapes[part]
        for method in methods(b, 1):
            for plan in every(START, axes(b, method, shape[1])[:2]):
                plan = fit(plan, Case(b, 1, *shape), gpu)
                yield product.Variant.of(plan, b, torch.float16, fused.get(part, product.Fused()), shape, 1)


def best_chain(chain: Chain, bits: int, processors: int, *, planes: bool) -> list[tuple[str, Launch, float]]:
    """For each of the chain's own products its launch and the time of a step, in microseconds."""
    shapes = chain.shapes
    plans = {part: launch.choose(*shapes[part], bits, 1, processors, chain=True, planes=planes) for part in shapes}

    def microseconds(part: str, plan: Launch) -> float:
        return statistics.median(chain.times_us(bits, plans | {part: plan}))

    for part in chain.own:
        time = functools.partial(microseconds, part)
        candidates = [plans[part]]
        for method in methods(bits, 1):
            if planes or not method.planes:
                choices = axes(bits, method, shapes[part][1])
                descent = Descent(choices, replace(plans[part], alone=False, **choices[0][0]))
                for axis in range(len(choices)):
                    descent.step(axis, time)
                candidates.append(descent.best)
        plans[part] = min(candidates, key=time)
    return [(part, plans[part], microseconds(part, plans[part])) for part in chain.own]
