"""The scheduler that lets a network look at the prefilled prompt and choose one of a few schedules, once a sequence.

Owns the decision; the network is in ``network.py``, its training in ``train.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pmpd.records import Prefill, Schedule
from pmpd.schedulers.base import Planned
from pmpd.schedulers.network import LearnedNetwork


class Learned:
    """Chooses the class with the largest logit.

    ``classes`` are schedules at the task's M, all with prefill at ``prefill_bits``, in the order of the labels.

    Raises:
        ValueError: another number of classes than the network's, or another prefill precision.
    """

    def __init__(self, network: LearnedNetwork, prefill_bits: int, classes: Sequence[Schedule]) -> None:
        if len(classes) != network.num_classes:
            raise ValueError(f"{len(classes)} classes given, the network was trained for {network.num_classes}")
        if any(schedule.prefill_bits != prefill_bits for schedule in classes):
            raise ValueError(f"prefill_bits={prefill_bits}, but the classes are {[s.name for s in classes]}")
        self.network = network.eval()
        self.prefill_bits = prefill_bits
        self.classes = tuple(classes)

    @property
    def reads_activations(self) -> bool:
        return self.network.reads_activations

    def begin(self, prefill: Prefill) -> Planned:
        """One forward of the network; on a GPU one synchronisation, the only one a sequence.

        Raises:
            ValueError: activations that the network looks at and ``prefill`` lacks.
        """
        device = self.network.output.weight.device
        activations = None if prefill.activations is None else prefill.activations[None].to(device)
        with torch.no_grad():
            logits = self.network(
                prefill.keys[None].to(device), prefill.values[None].to(device), activations=activations
            )
        return Planned(self.classes[int(logits.argmax())])
