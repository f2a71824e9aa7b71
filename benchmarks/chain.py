"""A decode step of a model on a GPU with launches that are given: what ``launches.py --chain`` compares.

Products that are timed alone (``nested_matmul.py``) do not say how they do beside each other: a kernel starts while
its predecessor ends, and which processors it finds free decides how long it takes. Nor do the blocks alone say all of
a step, nor a step's graph all of the decode loop: how kernels fall beside each other depends on what comes before the
first. So it is the loop that is timed. Weights are random, of the models' true shapes, another for each block; batch 1.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from decode import WARM_UP, shape, times_from_us

from pmpd.decode import prefill
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama_step import LlamaStep
from pmpd.decode.random import random_llama
from pmpd.kernels import launch
from pmpd.kernels.launch import Launch
from pmpd.records import Schedule
from pmpd.schedulers import Planned

PRODUCTS = ("qkv", "output", "gate_up", "down")
STEPS = 20


class Chain:
    """The kernels of one random model's step.

    Attributes:
        shapes: outputs and inputs of each of a block's products, no two alike.
    """

    def __init__(self, name: str, bits: list[int], context: int) -> None:
        self.llama, self.cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
        assert self.cell is not None
        self.cell.prepare(bits[0])
        self.step = LlamaStep(self.llama)
        prompt = torch.randint(3, 32000, (context,)).tolist()
        self.state = prefill(self.llama, self.cell, [prompt], bits[0], max_new_tokens=STEPS + WARM_UP + 1)
        layers: Any = {name: getattr(self.llama.blocks[0], name) for name in PRODUCTS}
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        assert len(set(self.shapes.values())) == len(PRODUCTS)

    def times_us(self, bits: int, launches: dict[str, Launch]) -> list[float]:
        """Microseconds of each step of the decode loop, at ``bits``."""
        of_shape = {self.shapes[name]: plan for name, plan in launches.items()}
        model = GraphedModel(self.llama, self.cell, self.step)
        policy = Planned(Schedule.uniform(bits))
        with mock.patch.object(launch, "choose", lambda *args, **_: of_shape[args[:2]]):
            return times_from_us(model, self.cell, self.state.fork(), policy, STEPS)
