"""The values that cross module borders: schedules, samples, generations, decode steps, intervals.

Plain frozen dataclasses; nothing here knows about models, files or configuration.
Indices follow one convention everywhere: *decode step* t (t = 1, 2, ...) is the forward that reads
generated token t and yields token t + 1. Token 1 comes from prefill alone, so a sequence of n
generated tokens has n - 1 decode steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FP16_BITS = 16
"""The precision that stands for the unquantised model."""


@dataclass(frozen=True, order=True)
class Schedule:
    """Bits of prefill and of every decode step of one sequence.

    ``levels`` are the decode precisions in turn; ``switch_steps[k]`` is the last decode step of ``levels[k]``, so
    steps ``1..switch_steps[0]`` run at ``levels[0]``. What a scheduler makes falls; a schedule that rises is for asking
    which part of decoding needs precision.

    Raises:
        ValueError: a level equal to the one before it, steps that fall, or a wrong number of steps.
    """

    prefill_bits: int
    levels: tuple[int, ...]
    switch_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels or any(a == b for a, b in pairwise(self.levels)):
            raise ValueError(f"levels must be non-empty, each different from the one before, got {self.levels}")
        if len(self.switch_steps) != len(self.levels) - 1:
            raise ValueError(
                f"{len(self.levels)} levels need {len(self.levels) - 1} switch_steps, got {self.switch_steps}"
            )
        if list(self.switch_steps) != sorted(self.switch_steps) or any(s < 0 for s in self.switch_steps):
            raise ValueError(f"switch_steps must be >= 0 and not fall, got {self.switch_steps}")

    @classmethod
    def uniform(cls, bits: int) -> Schedule:
        """The same precision for prefill and every decode step."""
        return cls(bits, (bits,))

    def bits_at(self, step: int) -> int:
        """Bits of decode step ``step`` (1-based)."""
        if step < 1:
            raise ValueError(f"decode steps count from 1, got step={step}")
        return self.levels[sum(step > s for s in self.switch_steps)]

    def bits_of(self, num_tokens: int) -> list[int]:
        """Bits of each decode step of a sequence of ``num_tokens`` generated tokens (``num_tokens - 1`` steps)."""
        return [self.bits_at(t) for t in range(1, num_tokens)]

    def canonical(self, max_new_tokens: int) -> Schedule:
        """The same behaviour over at most ``max_new_tokens`` tokens, with levels that are never used left out."""
        last_step = max(max_new_tokens - 1, 1)
        bounds = [0, *(min(s, last_step) for s in self.switch_steps), last_step]
        used = [k for k in range(len(self.levels)) if bounds[k] < bounds[k + 1]]
        # Where a level is left out, its neighbours may be equal: the later one's end is then the end of both.
        ends = [k for k, after in zip(used, [*used[1:], None], strict=True) if after is None or self._differ(k, after)]
        return Schedule(
            self.prefill_bits,
            tuple(self.levels[k] for k in ends),
            tuple(bounds[k + 1] for k in ends[:-1]),
        )

    def _differ(self, one: int, other: int) -> bool:
        return self.levels[one] != self.levels[other]

    @property
    def name(self) -> str:
        """A short unique name: ``4:4@21,3`` is prefill at 4 bits, decode steps 1..21 at 4, the rest at 3."""
        parts = [f"{bits}@{step}" for bits, step in zip(self.levels, self.switch_steps, strict=False)]
        return f"{self.prefill_bits}:" + ",".join([*parts, str(self.levels[-1])])

    @classmethod
    def parse(cls, name: str) -> Schedule:
        """The schedule whose :attr:`name` is ``name``.

        Raises:
            ValueError: not of that form, or a schedule that cannot be.
        """
        prefill, _, rest = name.partition(":")
        pairs = [part.partition("@") for part in rest.split(",")]
        try:
            levels, steps = [int(p[0]) for p in pairs], [int(p[2]) for p in pairs[:-1]]
            prefill_bits = int(prefill)
        except ValueError as error:
            raise ValueError(f"schedule={name!r} is not PREFILL:BITS or PREFILL:BITS@STEP,...,BITS") from error
        return cls(prefill_bits, tuple(levels), tuple(steps))


def average_bits(bits: Sequence[float]) -> float:
    """Mean bits over the decode steps of one sequence; NaN when it has none."""
    return sum(bits) / len(bits) if bits else math.nan


def switch_grid(max_new_tokens: int, parts: int = 3) -> tuple[int, ...]:
    """Candidate switch steps, multiples of M / ``parts`` (floor), M = ``max_new_tokens``; the paper: thirds."""
    return tuple(max_new_tokens * k // parts for k in range(parts + 1))


def schedule_family(prefill_bits: int, levels: Sequence[int], grid: Sequence[int]) -> list[Schedule]:
    """Every schedule over ``levels`` with switch steps from ``grid``, in order of average bits, cheapest first.

    With two levels this is one schedule a grid step, in order of the step. With more, every
    non-falling tuple of switch steps; equal averages keep the tuple order.
    """
    steps = sorted(set(grid))
    end = max(steps) if steps else 0

    def cost(tuple_: tuple[int, ...]) -> int:
        bounds = (0, *tuple_, end)
        return sum(b * (hi - lo) for b, lo, hi in zip(levels, bounds, bounds[1:], strict=False))

    tuples = combinations_with_replacement(steps, len(levels) - 1)
    return [Schedule(prefill_bits, tuple(levels), t) for t in sorted(tuples, key=lambda t: (cost(t), t))]


def pattern_schedule(prefill_bits: int, pattern: Sequence[int], max_new_tokens: int) -> Schedule:
    """M in as many equal parts as ``pattern`` has entries, each at its own bits, which may rise.

    Parts end where the classes of as many parts switch, so ``[high, low, low]`` is the class of M/3.
    """
    bounds = [max_new_tokens * k // len(pattern) for k in range(1, len(pattern) + 1)]
    runs = [k for k in range(len(pattern)) if k + 1 == len(pattern) or pattern[k] != pattern[k + 1]]
    return Schedule(prefill_bits, tuple(pattern[k] for k in runs), tuple(bounds[k] for k in runs[:-1]))


def class_schedules(prefill_bits: int, levels: Sequence[int], max_new_tokens: int, parts: int = 3) -> list[Schedule]:
    """The learned scheduler's classes at M = ``max_new_tokens``, in order of average bits, cheapest first.

    A class is a tuple of fractions k/parts of M. The order is that of the fractions, so a class means
    the same at every M. Two levels give the paper's four classes 0, M/3, 2M/3, M.
    """
    return [
        Schedule(prefill_bits, tuple(levels), tuple(max_new_tokens * k // parts for k in fractions.switch_steps))
        for fractions in schedule_family(prefill_bits, levels, range(parts + 1))
    ]


@dataclass(frozen=True)
class Sample:
    """One example of a task.

    Attributes:
        id: unique within its split.
        turns: user messages, in order, instruction included. One for most tasks, two for MT-Bench.
        references: reference outputs (several when a data set has several; none for MT-Bench).
        document: the part of ``turns[0]`` that may be shortened to fit a context; ``""`` if nothing may.
        category: a label for break-downs, ``""`` if the set has none.
        raw: the first turn is text to be continued, so no chat template is put around it.
    """

    id: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    document: str = ""
    category: str = ""
    raw: bool = False


@dataclass(frozen=True)
class Generation:
    """What one prompt became under one schedule.

    ``token_ids`` holds every generated token, the end-of-sequence token included when ``ended``.
    """

    schedule: Schedule
    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def decode_bits(self) -> list[int]:
        """Bits of each decode step taken."""
        return self.schedule.bits_of(len(self.token_ids))

    def to_json(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.name,
            "prompt_tokens": self.prompt_tokens,
            "token_ids": list(self.token_ids),
            "text": self.text,
            "ended": self.ended,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Generation:
        return cls(
            Schedule.parse(row["schedule"]),
            row["prompt_tokens"],
            tuple(row["token_ids"]),
            row["text"],
            row["ended"],
        )


@dataclass(frozen=True)
class Completion:
    """One sample answered: a generation for each turn."""

    sample_id: str
    generations: tuple[Generation, ...]

    @property
    def decode_bits(self) -> list[int]:
        """Bits of every decode step of every turn."""
        return [bits for generation in self.generations for bits in generation.decode_bits]


@dataclass(frozen=True)
class Step:
    """One forward of the decode loop over a batch.

    Attributes:
        index: decode step t; 0 is prefill, which yields token 1.
        tokens: int64 ``[batch]``, the tokens that this forward yielded, on the model's device.
        bits: precision of the forward.
        rows: int64 ``[batch]``, which prompt of the original batch each token belongs to.
    """

    index: int
    tokens: Tensor
    bits: int
    rows: Tensor


@dataclass(frozen=True)
class Prefill:
    """What a scheduler may look at before decoding: one sequence, no padding, no batch dimension.

    Attributes:
        keys: ``[kv_heads, length, head_dim]`` of the last block, after rotary embedding.
        values: same shape.
        logits: ``[vocab]`` at the last prompt position.
        max_new_tokens: M, what fractions of a class refer to.
        activations: float32 ``[layers, 2, hidden]``, mean and variance over the prompt's positions of every block's
            output; None unless a scheduler asked for them.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor
    max_new_tokens: int
    activations: Tensor | None = None


@dataclass(frozen=True)
class Interval:
    """A mean or statistic with its bootstrap interval and the number of resampled units."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape, all that the hardware models need.

    Attributes:
        linear_shapes: ``(out, in)`` of every weight matrix of one block.
        vocab_size: rows of the output head.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear_shapes: tuple[tuple[int, int], ...]
    vocab_size: int
