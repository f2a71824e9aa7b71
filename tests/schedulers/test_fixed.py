from __future__ import annotations

import torch

from pmpd.records import Prefill, Schedule
from pmpd.schedulers import Fixed


def test_every_sequence_gets_the_schedule() -> None:
    schedule = Schedule(8, (4, 3), (2,))
    scheduler = Fixed(schedule)
    assert scheduler.prefill_bits == 8
    for length in (1, 5):
        keys = torch.zeros(2, length, 4)
        policy = scheduler.begin(Prefill(keys, keys, torch.zeros(9), 10))
        assert policy == scheduler.policy()
        assert policy.schedule == schedule
        assert [policy.bits(t, None) for t in range(1, 5)] == [4, 4, 3, 3]
