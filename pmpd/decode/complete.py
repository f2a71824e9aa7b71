"""Answers under a scheduler: for a batch at once, or for one prompt token by token.

Knows how a scheduler's decisions become decoding; does not know how it decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from pmpd.decode.ahead import ahead
from pmpd.decode.loop import State, decode, prefill
from pmpd.decode.tree import decode_tree
from pmpd.quant import PrecisionCell
from pmpd.records import Schedule, Step
from pmpd.schedulers import Planned, Policy, ReadsActivations, Scheduler


def finish(
    model: nn.Module,
    cell: PrecisionCell | None,
    state: State,
    policies: Mapping[int, Policy],
    *,
    eos_ids: Collection[int],
) -> list[tuple[Schedule, list[int]]]:
    """Decode from a fresh ``state``, which is used up, the rows that ``policies`` has, each under its own.

    Rows share forwards for as long as their policies agree.

    Returns:
        in the order of ``policies``, the schedule that each row was decoded under and its generated token ids,
        end-of-sequence token included.

    Raises:
        ValueError: a policy that raised the bits.
    """
    answers: dict[int, tuple[Schedule, list[int]]] = {}
    planned: dict[Schedule, list[int]] = {}
    undecided = {}
    for row, policy in policies.items():
        if policy.schedule is None:
            undecided[row] = policy
        else:
            planned.setdefault(policy.schedule, []).append(row)
    if undecided:
        rows = torch.tensor(sorted(undecided), device=state.rows.device)
        answers |= _follow(model, cell, state.fork(rows), undecided, eos_ids)
    if planned:
        state.keep(torch.tensor([row for rows in planned.values() for row in rows], device=state.rows.device))
        rows_of = {schedule: torch.tensor(rows, device=state.rows.device) for schedule, rows in planned.items()}
        done = decode_tree(model, cell, state, rows_of, eos_ids=eos_ids)
        for schedule, rows_ in planned.items():
            answers |= {row: (schedule, ids) for row, ids in zip(rows_, done[schedule], strict=True)}
    return [answers[row] for row in policies]


def stream(
    model: nn.Module,
    cell: PrecisionCell | None,
    prompt: Sequence[int],
    scheduler: Scheduler,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
) -> Iterator[Step]:
    """The steps of one prompt as they are taken, tokens on the CPU; the first, with index 0, is prefill's token.

    On a GPU end-of-sequence is looked at a few steps late, so that its queue never runs dry.

    Raises:
        ValueError: as :func:`pmpd.decode.loop.prefill`, when the first step is asked for.
    """
    reads_activations = isinstance(scheduler, ReadsActivations) and scheduler.reads_activations
    state = prefill(
        model,
        cell,
        [prompt],
        scheduler.prefill_bits,
        max_new_tokens=max_new_tokens,
        activations=reads_activations,
    )
    policy = scheduler.begin(state.view(0))
    steps = decode(model, cell, state, policy, max_new_tokens=max_new_tokens, eos_ids=())
    yield from ahead(steps, eos_ids)


def _follow(
    model: nn.Module,
    cell: PrecisionCell | None,
    state: State,
    policies: Mapping[int, Policy],
    eos_ids: Collection[int],
) -> dict[int, tuple[Schedule, list[int]]]:
    """Policies that look at every step's logits. Rows whose bits part go on in a fork of the cache."""
    prefill_bits, limit = state.bits, state.max_new_tokens
    tokens: dict[int, list[int]] = {row: [] for row in policies}
    bits: dict[int, list[int]] = {row: [] for row in policies}
    parted: list[tuple[State, int]] = [(state, prefill_bits)]
    while parted:
        state, own = parted.pop()
        asked = state.step > 0  # a fork knows the bits of its first step
        while len(state) and state.step < limit:
            if state.step and not asked:
                own = _part(state, policies, parted)
            asked = False
            if state.step:
                for row in state.rows.tolist():
                    bits[row].append(own)
            uniform = Planned(Schedule.uniform(own))
            for step in decode(model, cell, state, uniform, max_new_tokens=state.step + 1, eos_ids=eos_ids):
                for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
                    tokens[row].append(token)
    return {row: (_schedule(prefill_bits, bits[row]), tokens[row]) for row in policies}


def _part(state: State, policies: Mapping[int, Policy], parted: list[tuple[State, int]]) -> int:
    """Ask every row; keep those of the highest bits, which are returned, in ``state``, and put the others in forks."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(state.rows.tolist()):
        groups.setdefault(policies[row].bits(state.step, state.logits[place : place + 1]), []).append(place)
    *others, (own, places) = sorted(groups.items())
    device = state.rows.device
    parted += [(state.fork(torch.tensor(group, device=device)), bits) for bits, group in others]
    if others:
        state.keep(torch.tensor(places, device=device))
    return own


def _schedule(prefill_bits: int, bits: Sequence[int]) -> Schedule:
    """The schedule of these decode steps."""
    if any(later > earlier for earlier, later in pairwise(bits)):
        raise ValueError(f"a policy must not raise the precision, this one chose {list(bits)}")
    levels = tuple(dict.fromkeys(bits)) or (prefill_bits,)
    return Schedule(prefill_bits, levels, tuple(len(bits) - bits[::-1].index(level) for level in levels[:-1]))
