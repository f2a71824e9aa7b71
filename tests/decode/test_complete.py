from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest
from torch import Tensor, nn

from pmpd.decode import finish, prefill, stream
from pmpd.records import Prefill, Schedule
from pmpd.schedulers import Fixed, Planned, Policy, Scheduler
from tests.decode.plain import RoundingCell, make_prompts, plain_decode

Quantised = tuple[nn.Module, RoundingCell]
PROMPTS = make_prompts(5, 17, 9, 5, 21)
M = 12


class ByLength:
    """A plan for long prompts, none for short ones."""

    prefill_bits = 4

    def __init__(self, plans: dict[int, Schedule | list[int]]) -> None:
        self.plans = plans

    def begin(self, prefill: Prefill) -> Policy:
        plan = self.plans[prefill.keys.shape[1]]
        return Planned(plan) if isinstance(plan, Schedule) else Listed(plan)


class Listed:
    schedule = None

    def __init__(self, bits: list[int]) -> None:
        self.chosen = bits

    def bits(self, step: int, logits: Tensor | None) -> int:
        assert logits is not None
        assert len(logits) == 1
        return self.chosen[step - 1]


def answered(
    quantised: Quantised, prompts: Sequence[list[int]], scheduler: Scheduler, eos: Collection[int]
) -> list[tuple[Schedule, list[int]]]:
    """One prefill for all, then each prompt under its own policy."""
    state = prefill(*quantised, prompts, scheduler.prefill_bits, max_new_tokens=M)
    policies = {row: scheduler.begin(state.view(row)) for row in range(len(prompts))}
    return finish(*quantised, state, policies, eos_ids=eos)


def test_every_prompt_follows_its_own_plan(quantised: Quantised) -> None:
    late, early = Schedule(4, (4, 3), (7,)), Schedule(4, (4, 2), (2,))
    plans: dict[int, Schedule | list[int]] = {5: late, 17: early, 9: Schedule(4, (3,)), 21: late}
    eos = [plain_decode(*quantised, PROMPTS[4], late, M)[4]]
    done = answered(quantised, PROMPTS, ByLength(plans), eos)
    assert done == [(plans[len(p)], plain_decode(*quantised, p, plans[len(p)], M, eos)) for p in PROMPTS]


def test_a_policy_without_a_plan_is_followed_and_becomes_a_schedule(quantised: Quantised) -> None:
    plan = Schedule(4, (4, 2), (2,))
    plans: dict[int, Schedule | list[int]] = {5: [4] * 3 + [3] * 8, 17: plan, 9: [4] * 11, 21: plan}
    done = answered(quantised, PROMPTS, ByLength(plans), [])
    expected = {5: Schedule(4, (4, 3), (3,)), 17: plan, 9: Schedule.uniform(4), 21: plan}
    assert done == [(expected[len(p)], plain_decode(*quantised, p, expected[len(p)], M)) for p in PROMPTS]


def test_rows_that_part_in_one_batch_end_as_they_would_alone(quantised: Quantised) -> None:
    prompts = make_prompts(5, 17, 9, 21, 13)
    plans: dict[int, Schedule | list[int]] = {
        5: [4] * 11,
        17: [4] * 2 + [3] * 4 + [2] * 5,
        9: [4] * 2 + [3] * 9,
        21: [2] * 11,
        13: [4] * 2 + [3] * 4 + [2] * 5,
    }
    schedules = [Schedule.uniform(4), *(Schedule(4, levels, steps) for levels, steps in (
        ((4, 3, 2), (2, 6)), ((4, 3), (2,)), ((2,), ()), ((4, 3, 2), (2, 6))
    ))]  # fmt: skip
    eos = [plain_decode(*quantised, prompts[2], schedules[2], M)[6]]
    done = answered(quantised, prompts, ByLength(plans), eos)
    for (schedule, ids), prompt, expected in zip(done, prompts, schedules, strict=True):
        alone = plain_decode(*quantised, prompt, expected, M, eos)
        assert ids == alone
        assert schedule.bits_of(len(ids)) == expected.bits_of(len(ids))


@pytest.mark.parametrize("bits", [[3, 4] + [4] * 9, [4, 3, 4] + [3] * 8])
def test_a_policy_that_raises_the_precision_is_refused(quantised: Quantised, bits: list[int]) -> None:
    with pytest.raises(ValueError, match="must not raise"):
        answered(quantised, PROMPTS[:1], ByLength({5: bits}), [])


def test_a_stream_yields_token_by_token(quantised: Quantised) -> None:
    schedule = Schedule(4, (4, 3), (5,))
    expected = plain_decode(*quantised, PROMPTS[1], schedule, M)
    eos = [expected[7]]
    steps = list(stream(*quantised, PROMPTS[1], Fixed(schedule), max_new_tokens=M, eos_ids=eos))
    assert [int(step.tokens) for step in steps] == plain_decode(*quantised, PROMPTS[1], schedule, M, eos)
    assert [step.bits for step in steps] == [4, *schedule.bits_of(len(steps))]
