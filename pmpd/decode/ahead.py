"""End of sequence without waiting for it: steps run a little ahead of the eyes that look for it.

Knows steps only. To ask a GPU for each token before giving it the next step would leave it idle between the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pmpd.records import Step

LOOKAHEAD = 2
"""Steps in the queue while the oldest is looked at: one that runs, one that waits. More would only be discarded."""


def ahead(steps: Iterator[Step], eos_ids: Collection[int], lookahead: int = LOOKAHEAD) -> Iterator[Step]:
    """What ``steps`` yields, tokens on the CPU, each row up to its end-of-sequence token.

    ``steps`` knows no end of sequence. On a GPU a step is looked at when ``lookahead`` later ones are in the queue,
    through a copy that nothing else waits for; what was computed beyond the last row's end is discarded. On a CPU
    nothing runs ahead. The state that ``steps`` advances is that of the step computed last, not of the one yielded.
    """
    waiting: deque[_Copied] = deque()
    ended: set[int] = set()

    def arrived() -> Step | None:
        """The oldest step without the rows that had ended before it, or None if all had."""
        step = waiting.popleft().wait()
        rows = step.rows.tolist()
        going = [place for place, row in enumerate(rows) if row not in ended]
        if not going:
            return None
        if len(going) < len(rows):
            step = replace(step, tokens=step.tokens[going], rows=step.rows[going])
        ended.update(row for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True) if token in eos)
        return step

    eos = frozenset(eos_ids)
    for step in steps:
        waiting.append(_Copied(step))
        if not step.tokens.is_cuda or len(waiting) > lookahead:
            if (next_step := arrived()) is None:
                return
            yield next_step
            if len(ended) and ended.issuperset(next_step.rows.tolist()):
                return
    while waiting and (next_step := arrived()) is not None:
        yield next_step


class _Copied:
    """A step on its way to the CPU."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.event: torch.cuda.Event | None = None
        if step.tokens.is_cuda:
            self.step = replace(step, tokens=_pinned(step.tokens), rows=_pinned(step.rows))
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(step.tokens.device))

    def wait(self) -> Step:
        if self.event is not None:
            self.event.synchronize()
        return self.step


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory, which is not there before the stream has come to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
