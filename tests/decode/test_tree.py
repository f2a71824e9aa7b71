from __future__ import annotations

import random
import weakref

import pytest
from torch import nn

from pmpd.decode import TreeStats, decode_schedules, prefill
from pmpd.decode import tree as tree_module
from pmpd.decode.tree import parting_step
from pmpd.records import Schedule, schedule_family, switch_grid
from tests.decode.plain import RoundingCell, make_prompts, plain_decode

Quantised = tuple[nn.Module, RoundingCell]
PROMPTS = make_prompts(5, 17, 9)
M = 13


def random_schedule(rng: random.Random) -> Schedule:
    levels = tuple(sorted(rng.sample([16, 4, 3, 2], rng.randint(1, 3)), reverse=True))
    steps = tuple(sorted(rng.randint(0, M + 3) for _ in levels[1:]))
    return Schedule(rng.choice([16, 4]), levels, steps)


@pytest.mark.parametrize("seed", range(4))
def test_each_schedule_yields_what_it_yields_alone(quantised: Quantised, seed: int) -> None:
    model, cell = quantised
    rng = random.Random(seed)
    schedules = [random_schedule(rng) for _ in range(8)]
    endless = [plain_decode(model, cell, p, schedules[0], M) for p in PROMPTS]
    eos = [endless[0][rng.randrange(M)], endless[1][rng.randrange(M)]]
    done = decode_schedules(model, cell, PROMPTS, schedules, max_new_tokens=M, eos_ids=eos)
    assert list(done) == list(dict.fromkeys(schedules))
    for schedule, answers in done.items():
        assert answers == [plain_decode(model, cell, p, schedule, M, eos) for p in PROMPTS], schedule.name


@pytest.mark.parametrize("m", [1, 2])
def test_the_shortest_outputs(quantised: Quantised, m: int) -> None:
    schedules = [Schedule.uniform(4), Schedule(4, (3,)), Schedule(4, (4, 3), (0,)), Schedule(4, (4, 3), (1,))]
    done = decode_schedules(*quantised, PROMPTS, schedules, max_new_tokens=m, eos_ids=[])
    assert done == {s: [plain_decode(*quantised, p, s, m) for p in PROMPTS] for s in schedules}


def test_a_grid_costs_one_rollout_and_its_forks(quantised: Quantised) -> None:
    schedules = schedule_family(4, (4, 3), switch_grid(M))
    stats, seen = TreeStats(), []
    decode_schedules(*quantised, PROMPTS, schedules, max_new_tokens=M, eos_ids=[], progress=seen.append, stats=stats)
    forked = (M - 1) + sum(M - 1 - s for s in (0, M // 3, 2 * M // 3))
    assert stats == TreeStats(
        forwards=forked,
        decoded_tokens=3 * forked,
        reused_tokens=3 * (4 * (M - 1) - forked),
        prefills=1,
    )
    assert sum(seen) == stats.decoded_tokens


def test_equal_behaviours_are_decoded_once(quantised: Quantised) -> None:
    stats = TreeStats()
    same = [
        Schedule(4, (4, 3), (M,)),
        Schedule.uniform(4),
        Schedule(4, (4, 3), (M - 1,)),
        Schedule(4, (4, 3), (M + 9,)),
    ]
    done = decode_schedules(*quantised, PROMPTS, same, max_new_tokens=M, eos_ids=[], stats=stats)
    assert stats.forwards == M - 1
    assert list(done) == same
    assert all(answers == done[same[0]] for answers in done.values())


def test_rows_that_ended_before_a_switch_are_not_decoded_again(quantised: Quantised) -> None:
    model, cell = quantised
    high = Schedule.uniform(4)
    eos = [plain_decode(model, cell, PROMPTS[1], high, M)[2]]
    lengths = [len(plain_decode(model, cell, p, high, M, eos)) for p in PROMPTS]
    assert lengths[1] <= 3
    late = Schedule(4, (4, 3), (6,))
    low = [len(plain_decode(model, cell, p, late, M, eos)) for p in PROMPTS]
    stats = TreeStats()
    decode_schedules(model, cell, PROMPTS, [high, late], max_new_tokens=M, eos_ids=eos, stats=stats)
    assert stats.decoded_tokens == sum(n - 1 for n in lengths) + sum(max(n - 7, 0) for n in low)


def test_schedules_that_never_part_before_everything_ended_share_it_all(quantised: Quantised) -> None:
    model, cell = quantised
    eos = [plain_decode(model, cell, p, Schedule.uniform(4), M)[1] for p in PROMPTS]
    stats = TreeStats()
    schedules = [Schedule(4, (4, 3), (s,)) for s in (4, 6, 8)]
    done = decode_schedules(model, cell, PROMPTS, schedules, max_new_tokens=M, eos_ids=eos, stats=stats)
    assert stats.forwards <= 1
    assert len({str(answers) for answers in done.values()}) == 1


def test_few_caches_live_at_a_time(quantised: Quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels: the rollout and one fork, however many switch steps."""
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    most = 0
    original = tree_module.decode

    def watched(model, cell, state, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal most
        alive.add(state.cache)
        most = max(most, len(alive))
        return original(model, cell, state, *args, **kwargs)

    monkeypatch.setattr(tree_module, "decode", watched)
    schedules = [Schedule(4, (4, 3), (s,)) for s in range(M)]
    decode_schedules(*quantised, PROMPTS, schedules, max_new_tokens=M, eos_ids=[])
    assert most == 2


def test_parting_step_is_where_bits_first_differ() -> None:
    rng = random.Random(0)
    for _ in range(200):
        schedules = [random_schedule(rng) for _ in range(rng.randint(1, 4))]
        start = rng.randint(0, M)
        differing = [t for t in range(max(start, 1), M) if len({s.bits_at(t) for s in schedules}) > 1]
        assert parting_step(schedules, start, M) == (differing[0] if differing else None)


def test_a_used_state_is_refused(quantised: Quantised) -> None:
    state = prefill(*quantised, PROMPTS, 4, max_new_tokens=M)
    state.step = 1
    with pytest.raises(AssertionError):
        tree_module.decode_tree(*quantised, state, {Schedule.uniform(4): state.rows}, eos_ids=[])
