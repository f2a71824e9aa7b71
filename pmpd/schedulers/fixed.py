"""The scheduler that gives every sequence the same schedule: fp16, uniform high or low, static."""

from __future__ import annotations

from dataclasses import dataclass

from pmpd.records import Prefill, Schedule
from pmpd.schedulers.base import Planned


@dataclass(frozen=True)
class Fixed:
    """``schedule`` for every sequence, whatever its prompt."""

    schedule: Schedule

    @property
    def prefill_bits(self) -> int:
        return self.schedule.prefill_bits

    def policy(self) -> Planned:
        """The policy of any sequence: no prefill is needed to know it."""
        return Planned(self.schedule)

    def begin(self, prefill: Prefill) -> Planned:
        return self.policy()
