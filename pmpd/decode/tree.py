"""Many schedules over one batch of prompts, every common prefix decoded once.

"High for s steps, then low" for all s is one high rollout and a fork of its cache at each s. In general
the schedules form a tree: they part where their bits first differ. Greedy decoding makes each result equal,
token for token, to decoding its schedule alone. Knows schedules, not what chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmpd.decode.loop import State, decode, prefill
from pmpd.quant import PrecisionCell
from pmpd.records import Schedule
from pmpd.schedulers import Planned

NO_TOKEN = -1
"""Where a row of the token table has ended."""


@dataclass
class TreeStats:
    """What a call computed, against what decoding each schedule alone would have.

    Attributes:
        forwards: decode forwards, each over all rows then alive.
        decoded_tokens: tokens that these forwards yielded.
        reused_tokens: further tokens that decoding each schedule alone would have yielded.
        prefills: prefill forwards.
    """

    forwards: int = 0
    decoded_tokens: int = 0
    reused_tokens: int = 0
    prefills: int = 0


def decode_schedules(
    model: nn.Module,
    cell: PrecisionCell | None,
    prompts: Sequence[Sequence[int]],
    schedules: Sequence[Schedule],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int = 0,
    progress: Callable[[int], None] | None = None,
    stats: TreeStats | None = None,
) -> dict[Schedule, list[list[int]]]:
    """Generated token ids of every prompt under every schedule, the end-of-sequence token included.

    Args:
        schedules: in any number, with any levels and prefill bits. Equal behaviours are decoded once.
        progress: called after each decode forward with the number of tokens it yielded.
        stats: counts are added to it.

    Raises:
        ValueError: as :func:`pmpd.decode.loop.prefill`.
    """
    stats = TreeStats() if stats is None else stats
    result: dict[Schedule, list[list[int]]] = {}
    for bits in dict.fromkeys(schedule.prefill_bits for schedule in schedules):
        state = prefill(model, cell, prompts, bits, max_new_tokens=max_new_tokens, pad_id=pad_id)
        stats.prefills += 1
        wanted = {schedule: state.rows for schedule in schedules if schedule.prefill_bits == bits}
        result |= decode_tree(model, cell, state, wanted, eos_ids=eos_ids, progress=progress, stats=stats)
    return {schedule: result[schedule] for schedule in schedules}


def decode_tree(
    model: nn.Module,
    cell: PrecisionCell | None,
    state: State,
    wanted: Mapping[Schedule, Tensor],
    *,
    eos_ids: Collection[int],
    progress: Callable[[int], None] | None = None,
    stats: TreeStats | None = None,
) -> dict[Schedule, list[list[int]]]:
    """Decode from a fresh ``state``, which is used up, each schedule for the rows (int64) that want it.

    Every schedule's lists are in the order of its rows. Rows that want different schedules share a batch for as
    long as these agree. At most as many caches live at a time as there are levels.
    """
    assert state.step == 0
    assert all(schedule.prefill_bits == state.bits for schedule in wanted)
    limit = state.max_new_tokens
    num_prompts = int(torch.cat([state.rows, *wanted.values()]).max()) + 1
    table = torch.full((num_prompts, limit), NO_TOKEN, device=state.rows.device)
    run = _Tree(model, cell, frozenset(eos_ids), progress, TreeStats() if stats is None else stats, {})
    decoded_before = run.stats.decoded_tokens
    run.descend(state, table, dict(wanted))
    alone = sum(len(ids) - 1 for rows in run.done.values() for ids in rows)
    run.stats.reused_tokens += alone - (run.stats.decoded_tokens - decoded_before)
    return run.done


@dataclass
class _Tree:
    model: nn.Module
    cell: PrecisionCell | None
    eos_ids: frozenset[int]
    progress: Callable[[int], None] | None
    stats: TreeStats
    done: dict[Schedule, list[list[int]]]

    def descend(self, state: State, table: Tensor, wanted: dict[Schedule, Tensor]) -> None:
        """Finish ``wanted`` from ``state``; ``table`` ``[num_prompts, max_new_tokens]`` has the tokens so far."""
        while True:
            fork_step = parting_step(list(wanted), state.step, state.max_new_tokens)
            self._advance(state, table, next(iter(wanted)), state.max_new_tokens if fork_step is None else fork_step)
            if fork_step is None or not len(state):
                break
            groups: dict[int, dict[Schedule, Tensor]] = {}
            for schedule, rows in wanted.items():
                groups.setdefault(schedule.bits_at(fork_step), {})[schedule] = rows
            *others, (_, wanted) = sorted(groups.items())  # the highest bits have the longest way to go
            for _, group in others:
                index = _places(state, group)
                if len(index):
                    self.descend(state.fork(index), table.clone(), group)
                else:
                    self._finish(table, group)
            index = _places(state, wanted)
            if len(index) < len(state):
                state.keep(index)
        self._finish(table, wanted)

    def _advance(self, state: State, table: Tensor, schedule: Schedule, num_tokens: int) -> None:
        steps = decode(self.model, self.cell, state, Planned(schedule), max_new_tokens=num_tokens, eos_ids=self.eos_ids)
        for step in steps:
            table[step.rows, step.index] = step.tokens
            if step.index:
                self.stats.forwards += 1
                self.stats.decoded_tokens += len(step.rows)
                if self.progress is not None:
                    self.progress(len(step.rows))

    def _finish(self, table: Tensor, wanted: Mapping[Schedule, Tensor]) -> None:
        for schedule, rows in wanted.items():
            self.done[schedule] = [[token for token in row if token != NO_TOKEN] for row in table[rows].tolist()]


def _places(state: State, wanted: Mapping[Schedule, Tensor]) -> Tensor:
    """Where in ``state`` the rows are that any of ``wanted`` still needs."""
    return torch.isin(state.rows, torch.cat(list(wanted.values()))).nonzero()[:, 0]


def parting_step(schedules: Sequence[Schedule], step: int, max_new_tokens: int) -> int | None:
    """The first decode step from ``step`` to the last one taken, ``max_new_tokens - 1``, at which bits differ."""
    changes = {s + 1 for schedule in schedules for s in schedule.switch_steps}
    for candidate in sorted({max(step, 1), *changes}):
        if max(step, 1) <= candidate < max_new_tokens and len({s.bits_at(candidate) for s in schedules}) > 1:
            return candidate
    return None
