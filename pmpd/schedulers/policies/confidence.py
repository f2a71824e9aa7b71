"""Steps down once the model is surer than it was at the start.

*Confidence* is the largest probability of the distribution that a token was taken from. Over the first tokens its mean
and (sample) standard deviation are taken; each later token above mean + ``sigmas`` deviations steps one precision down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pmpd.records import Prefill
from pmpd.schedulers.build import Setting

TRAINED: tuple[str, ...] = ()


@dataclass
class Following:
    """The policy of one sequence; it looks at every step's logits."""

    levels: tuple[int, ...]
    sigmas: float
    first_tokens: int
    seen: list[float] = field(default_factory=list)
    place: int = 0
    schedule: None = None

    def bits(self, step: int, logits: Tensor | None) -> int:
        """Decode step t reads token t, whose confidence is that of ``logits`` ``[1, vocab]``."""
        assert logits is not None
        assert len(logits) == 1
        self.seen.append(float(logits[0].double().softmax(-1).max()))
        if len(self.seen) > self.first_tokens and self.place + 1 < len(self.levels):
            first = torch.tensor(self.seen[: self.first_tokens], dtype=torch.float64)
            self.place += self.seen[-1] > float(first.mean() + self.sigmas * first.std())
        return self.levels[self.place]


@dataclass(frozen=True)
class Confidence:
    """
    Attributes:
        sigmas: standard deviations above the mean; the reference code takes 1.
        first_tokens: tokens that mean and deviation are over; the reference code takes 10.

    Raises:
        ValueError: fewer than two first tokens, which have no deviation.
    """

    prefill_bits: int
    levels: tuple[int, ...]
    sigmas: float
    first_tokens: int

    def __post_init__(self) -> None:
        if self.first_tokens < 2:
            raise ValueError(f"scheduler.options.first_tokens={self.first_tokens} is not possible: at least 2")

    def begin(self, prefill: Prefill) -> Following:
        return Following(self.levels, self.sigmas, self.first_tokens)


def build(setting: Setting, sigmas: float = 1.0, first_tokens: int = 10) -> Confidence:
    return Confidence(setting.prefill_bits, setting.levels, sigmas, first_tokens)
