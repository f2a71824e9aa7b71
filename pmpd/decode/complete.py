"""Answers under a scheduler: for a batch at once, or for one prompt token by token.

Knows how a scheduler's decisions become decoding; does not know how it decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from pmpd.decode.ahead import ahead
from pmpd.decode.loop import State, decode, prefill
from pmpd.decode.tree import decode_tree
from pmpd.quant import PrecisionCell
from pmpd.records import Schedule, Step
from pmpd.schedulers import Policy, Scheduler


def complete(
    model: nn.Module,
    cell: PrecisionCell | None,
    prompts: Sequence[Sequence[int]],
    scheduler: Scheduler,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int = 0,
) -> list[tuple[Schedule, list[int]]]:
    """The schedule that each prompt was decoded under and its generated token ids, end-of-sequence token included.

    One prefill for the batch, one decision a prompt. Prompts whose plans agree share forwards for as long as they
    do; a policy without a plan is followed on its own.

    Raises:
        ValueError: as :func:`pmpd.decode.loop.prefill`; or a policy that raised the bits, which no schedule can say.
    """
    state = prefill(model, cell, prompts, scheduler.prefill_bits, max_new_tokens=max_new_tokens, pad_id=pad_id)
    policies = [scheduler.begin(state.view(row)) for row in range(len(prompts))]
    answers: dict[int, tuple[Schedule, list[int]]] = {}
    wanted: dict[Schedule, list[int]] = {}
    for row, policy in enumerate(policies):
        if policy.schedule is None:
            alone = state.fork(torch.tensor([row], device=state.rows.device))
            answers[row] = _follow(model, cell, alone, policy, eos_ids)
        else:
            wanted.setdefault(policy.schedule, []).append(row)
    if wanted:
        state.keep(torch.tensor([row for rows in wanted.values() for row in rows], device=state.rows.device))
        rows_of = {schedule: torch.tensor(rows, device=state.rows.device) for schedule, rows in wanted.items()}
        done = decode_tree(model, cell, state, rows_of, eos_ids=eos_ids)
        for schedule, rows in wanted.items():
            answers |= {row: (schedule, ids) for row, ids in zip(rows, done[schedule], strict=True)}
    return [answers[row] for row in range(len(prompts))]


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
    state = prefill(model, cell, [prompt], scheduler.prefill_bits, max_new_tokens=max_new_tokens)
    policy = scheduler.begin(state.view(0))
    steps = decode(model, cell, state, policy, max_new_tokens=max_new_tokens, eos_ids=())
    yield from ahead(steps, eos_ids)


def _follow(
    model: nn.Module, cell: PrecisionCell | None, state: State, policy: Policy, eos_ids: Collection[int]
) -> tuple[Schedule, list[int]]:
    prefill_bits, limit = state.bits, state.max_new_tokens
    steps = list(decode(model, cell, state, policy, max_new_tokens=limit, eos_ids=eos_ids))
    bits = [step.bits for step in steps[1:]]
    levels = tuple(dict.fromkeys(bits)) or (prefill_bits,)
    ends = tuple(len(bits) - bits[::-1].index(level) for level in levels[:-1])
    schedule = Schedule(prefill_bits, levels, ends)
    if schedule.bits_of(len(steps)) != bits:
        raise ValueError(f"a policy must not raise the precision, this one chose {bits}")
    return schedule, [int(step.tokens) for step in steps]
