"""The scheduler that draws a class, whatever the prompt: what a learned one has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pmpd.records import Prefill, Schedule
from pmpd.schedulers.base import Planned


class Random:
    """Draws one of ``classes`` a sequence, class k with ``probabilities[k]``; equal seeds give equal draws, in order.

    Raises:
        ValueError: another number of probabilities than classes, a negative one, or a sum that is not 1.
    """

    def __init__(
        self, prefill_bits: int, classes: Sequence[Schedule], probabilities: Sequence[float], seed: int
    ) -> None:
        if len(probabilities) != len(classes):
            raise ValueError(f"{len(probabilities)} probabilities for {len(classes)} classes")
        if min(probabilities) < 0 or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-3):
            raise ValueError(f"probabilities={list(probabilities)}: none below 0, and their sum 1")
        self.prefill_bits = prefill_bits
        self.classes = tuple(classes)
        self.weights = torch.tensor(probabilities, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)

    def policy(self) -> Planned:
        """The next draw."""
        return Planned(self.classes[int(torch.multinomial(self.weights, 1, generator=self.generator))])

    def begin(self, prefill: Prefill) -> Planned:
        return self.policy()
