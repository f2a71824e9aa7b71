"""What a scheduler is. It receives tensors, never a model.

A scheduler makes a fresh policy for every sequence, so no state leaks between prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pmpd.records import Prefill, Schedule


class Policy(Protocol):
    """The precision of each decode step of one sequence (or of several that share the policy)."""

    @property
    def schedule(self) -> Schedule | None:
        """The whole plan, if it is known before decoding; None if every step is decided on its own."""

    def bits(self, step: int, logits: Tensor | None) -> int:
        """Bits of decode step ``step`` (from 1); ``logits`` ``[batch, vocab]`` are those of the forward before it,
        which the step may write over."""


class Scheduler(Protocol):
    """Decides once a sequence has been prefilled at ``prefill_bits``."""

    @property
    def prefill_bits(self) -> int: ...

    def begin(self, prefill: Prefill) -> Policy:
        """The policy of the sequence whose prefill this is."""


@runtime_checkable
class Blind(Protocol):
    """A scheduler that looks at nothing: where no token is missing, no prompt is read for it."""

    def policy(self) -> Planned:
        """The policy of the next sequence."""


@runtime_checkable
class ReadsActivations(Protocol):
    """A scheduler that may look at ``Prefill.activations``, which are not computed for the others."""

    @property
    def reads_activations(self) -> bool: ...


@dataclass(frozen=True)
class Planned:
    """The policy that follows ``schedule``."""

    schedule: Schedule

    def bits(self, step: int, logits: Tensor | None = None) -> int:
        """Bits of decode step ``step``; the logits are not looked at."""
        return self.schedule.bits_at(step)
