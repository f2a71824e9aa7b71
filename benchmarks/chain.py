"""A decode step of a model on a GPU with launches that are given: what ``launches.py --chain`` compares.

Products that are timed alone (``nested_matmul.py``) do not say how they do beside each other: a kernel starts while
its predecessor ends, and which processors it finds free decides how long it takes. Nor do the blocks alone say all of
a step: how they fall beside each other depends on what comes before the first. Weights are random, of the models' true
shapes, different for every block; batch 1.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
from decode import shape

from pmpd.decode import prefill
from pmpd.decode.llama_step import LlamaStep
from pmpd.decode.random import random_llama
from pmpd.kernels import launch
from pmpd.kernels.launch import Launch

PRODUCTS = ("qkv", "output", "gate_up", "down")
REPLAYS = 20


class Chain:
    """The kernels of one random model's step.

    Attributes:
        shapes: outputs and inputs of each of a block's products, no two alike.
    """

    def __init__(self, name: str, bits: list[int], context: int) -> None:
        model, cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
        assert cell is not None
        cell.prepare(bits[0])
        self.step = LlamaStep(model)
        prompt = torch.randint(3, 32000, (context,)).tolist()
        self.state = prefill(model, cell, [prompt], bits[0], max_new_tokens=REPLAYS + 4)
        layers: Any = {name: getattr(model.blocks[0], name) for name in PRODUCTS}
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        assert len(set(self.shapes.values())) == len(PRODUCTS)

    def run(self, bits: int, launches: dict[str, Launch]) -> None:
        """Queue a step."""
        of_shape = {self.shapes[name]: plan for name, plan in launches.items()}
        with mock.patch.object(launch, "choose", lambda *args, **_: of_shape[args[:2]]):
            self.step.run(bits, 1)

    def times_us(self, bits: int, launches: dict[str, Launch]) -> list[float]:
        """Microseconds of each replay, one after the other without a pause."""
        self.step.bind(self.state)
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
        return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
