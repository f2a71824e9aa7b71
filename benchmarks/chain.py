"""A decode step of a model on a GPU with launches that are given: what ``launches.py --chain`` compares.

Products that are timed alone (``nested_matmul.py``) do not say how they do beside each other: a kernel starts while
its predecessor ends, and which processors it finds free decides how long it takes. Nor do the blocks alone say all of
a step, nor a step's graph all of the decode loop: how kernels fall beside each other depends on what comes before the
first. So it is the loop that is timed. Weights are random, of the models' true shapes, another for each block; batch 1.
"""

from __future__ import annotations

from unittest import mock

import torch
from decode import SHAPES, WARM_UP, shape, times_from_us

from pmpd.decode import prefill
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama import head_dim
from pmpd.decode.llama_step import LlamaStep
from pmpd.decode.random import random_llama
from pmpd.kernels import launch
from pmpd.kernels.launch import Launch
from pmpd.records import Schedule
from pmpd.schedulers import Planned

STEPS = 20


def products(name: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each of a block's products, in the order of their descents."""
    config = shape(name)
    channels = head_dim(config)
    heads, kv_heads = config.num_attention_heads * channels, config.num_key_value_heads * channels
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "qkv": (heads + 2 * kv_heads, hidden),
        "output": (hidden, heads),
    }


def own_products(name: str) -> list[str]:
    """Those of a shape that no model before it in ``SHAPES`` has: a shape has one launch in a chain."""
    earlier = list(SHAPES)[: list(SHAPES).index(name)]
    theirs = {sizes for other in earlier for sizes in products(other).values()}
    return [part for part, sizes in products(name).items() if sizes not in theirs]


class Chain:
    """The kernels of one random model's step.

    Attributes:
        shapes: of :func:`products`, no two alike.
        own: those products whose launches are this model's to choose, :func:`own_products`.
    """

    def __init__(self, name: str, bits: list[int], context: int) -> None:
        self.llama, self.cell = random_llama(shape(name), bits, device="cuda", keep_original=False)
        assert self.cell is not None
        self.cell.prepare(bits[0])
        self.step = LlamaStep(self.llama)
        prompt = torch.randint(3, 32000, (context,)).tolist()
        self.state = prefill(self.llama, self.cell, [prompt], bits[0], max_new_tokens=STEPS + WARM_UP + 1)
        self.shapes, self.own = products(name), own_products(name)
        layers = {part: getattr(self.llama.blocks[0], part) for part in self.shapes}
        assert self.shapes == {part: (layer.out_features, layer.in_features) for part, layer in layers.items()}
        assert len(set(self.shapes.values())) == len(self.shapes)

    def times_us(self, bits: int, launches: dict[str, Launch]) -> list[float]:
        """Microseconds of each step of the decode loop, at ``bits``."""
        of_shape = {self.shapes[name]: plan for name, plan in launches.items()}
        model = GraphedModel(self.llama, self.cell, self.step)
        policy = Planned(Schedule.uniform(bits))
        with mock.patch.object(launch, "choose", lambda *args, **_: of_shape[args[:2]]):
            return times_from_us(model, self.cell, self.state.fork(), policy, STEPS)
