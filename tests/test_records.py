"""The conventions of the paper, pinned by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmpd.records import (
    Completion,
    Generation,
    Schedule,
    average_bits,
    class_schedules,
    pattern_schedule,
    schedule_family,
    switch_grid,
)


def test_switch_step_s_runs_steps_1_to_s_high():
    schedule = Schedule(4, (4, 3), (2,))
    assert [schedule.bits_at(t) for t in (1, 2, 3, 4)] == [4, 4, 3, 3]


def test_s_zero_is_all_low_and_s_at_least_the_last_step_is_all_high():
    assert Schedule(4, (4, 3), (0,)).bits_of(5) == [3, 3, 3, 3]
    assert Schedule(4, (4, 3), (4,)).bits_of(5) == [4, 4, 4, 4]


def test_token_1_comes_from_prefill_so_n_tokens_have_n_minus_1_steps():
    assert len(Schedule.uniform(4).bits_of(5)) == 4
    assert Schedule.uniform(4).bits_of(1) == []


def test_average_bits_is_over_all_decode_steps():
    assert average_bits(Schedule(4, (4, 3), (1,)).bits_of(5)) == pytest.approx(13 / 4)
    assert average_bits([]) != average_bits([])  # NaN: no step to average


def test_three_levels_use_each_as_long_as_chosen():
    assert Schedule(4, (4, 3, 2), (1, 3)).bits_of(6) == [4, 3, 3, 2, 2]


def test_all_low_after_a_high_prefill_is_not_uniform_low():
    assert Schedule(4, (4, 3), (0,)).canonical(8) == Schedule(4, (3,)) != Schedule.uniform(3)


def test_switching_at_the_end_is_uniform_high():
    assert Schedule(4, (4, 3), (8,)).canonical(8) == Schedule.uniform(4)


def test_grid_is_the_papers_thirds():
    assert switch_grid(256) == (0, 85, 170, 256)
    assert switch_grid(33) == (0, 11, 22, 33)


def test_classes_are_fractions_of_any_m_cheapest_first():
    assert [s.switch_steps for s in class_schedules(4, (4, 3), 256)] == [(0,), (85,), (170,), (256,)]
    three = class_schedules(4, (4, 3, 2), 30)
    assert three[0].switch_steps == (0, 0)
    assert three[-1].switch_steps == (30, 30)
    averages = [average_bits(s.bits_of(31)) for s in three]
    assert averages == sorted(averages)
    longer = class_schedules(4, (4, 3, 2), 300)
    assert [tuple(10 * s for s in c.switch_steps) for c in three] == [c.switch_steps for c in longer]


@pytest.mark.parametrize(
    ("levels", "steps"), [((4, 4), (1,)), ((4, 3), ()), ((4, 3, 2), (3, 1)), ((4, 3), (-1,)), ((), ())]
)
def test_impossible_schedules_are_refused(levels, steps):
    with pytest.raises(ValueError, match="levels|switch_steps"):
        Schedule(4, levels, steps)


def test_a_pattern_cuts_decoding_into_equal_parts_and_may_rise():
    assert pattern_schedule(4, [4, 3], 9).bits_of(9) == [4] * 4 + [3] * 4
    assert pattern_schedule(4, [3, 4], 9).bits_of(9) == [3] * 4 + [4] * 4
    assert pattern_schedule(4, [3, 4, 3], 10).bits_of(10) == [3] * 3 + [4] * 3 + [3] * 3
    assert pattern_schedule(4, [4, 3, 3], 256) == class_schedules(4, (4, 3), 256)[1]
    assert pattern_schedule(3, [4, 4], 9) == Schedule(3, (4,))
    assert pattern_schedule(4, [3, 4], 9).canonical(4) == Schedule(4, (3,))  # ended before the second part


def test_equal_levels_left_beside_each_other_are_one():
    assert Schedule(4, (3, 4, 3), (2, 2)).canonical(9) == Schedule(4, (3,))
    assert Schedule(4, (3, 4, 3, 2), (2, 2, 5)).canonical(9) == Schedule(4, (3, 2), (5,))


schedules = st.builds(
    lambda levels, raw: Schedule(4, tuple(sorted(levels, reverse=True)), tuple(sorted(raw[: len(levels) - 1]))),
    st.sets(st.integers(2, 8), min_size=1, max_size=4),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
)


@given(schedules, st.integers(2, 12))
def test_canonical_form_decodes_alike(schedule, max_new_tokens):
    same = schedule.canonical(max_new_tokens)
    assert same.bits_of(max_new_tokens) == schedule.bits_of(max_new_tokens)
    assert same.canonical(max_new_tokens) == same


@given(schedules)
def test_names_round_trip_and_bits_never_rise(schedule):
    assert Schedule.parse(schedule.name) == schedule
    bits = schedule.bits_of(14)
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("name", ["statc", "4", "4:", "4:4@,3", "4:4@x,3", "4:4,3"])
def test_a_name_that_is_no_schedule_is_told_the_form(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not PREFILL:BITS or PREFILL:BITS@STEP,...,BITS"):
        Schedule.parse(name)


@given(schedules, st.integers(2, 12))
def test_a_family_in_order_of_cost_is_in_order_of_average_bits(schedule, max_new_tokens):
    family = schedule_family(4, schedule.levels, switch_grid(max_new_tokens))
    averages = [sum(s.bits_of(max_new_tokens + 1)) for s in family]
    assert averages == sorted(averages)


def test_generations_survive_json():
    generation = Generation(Schedule(4, (4, 3), (2,)), 7, (5, 6, 2), "a b", True)
    assert Generation.from_json(generation.to_json()) == generation
    assert Completion("x", (generation, generation)).decode_bits == [4, 4, 4, 4]
