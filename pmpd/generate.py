"""A model that answers: text in, text out piece by piece, each with the precision that its token was computed at.

A consumer of the decode loop. Knows prompts and schedulers by name; does not know how a nested model is made or found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pmpd.artifacts import MANIFEST, read_json
from pmpd.decode import stream
from pmpd.models import Prompter
from pmpd.quant import PrecisionCell
from pmpd.records import FP16_BITS, Schedule, class_schedules
from pmpd.schedulers import Fixed, Learned, Scheduler, load_network
from pmpd.stages.learned import NETWORK_FILE, TRAIN_LEARNED

NAMED = ("fp16", "high", "low", "static")
"""Schedulers that have a name."""
STATIC_FRACTION = 3
"""``static`` without a switch step switches after a third of ``max_new_tokens``: the first step of the paper's grid
that is not 0. A step fitted on data (``fit_static``) is better."""


@dataclass(frozen=True)
class Piece:
    """One token and the text that it completed.

    Attributes:
        index: from 0; token 0 comes from prefill.
        token: its id.
        bits: precision of the forward that yielded it.
        text: what it adds to the answer; empty for a special token and where a character is not complete yet.
    """

    index: int
    token: int
    bits: int
    text: str


def check_request(
    scheduler: str | Path | Schedule | Scheduler, max_new_tokens: int, switch_step: int | None = None
) -> None:
    """What can be known to be wrong with arguments of :meth:`Model.generate` before there is a model.

    Raises:
        ValueError: a scheduler that there is not, or a number of tokens or steps out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    if switch_step is not None and scheduler != "static":
        raise ValueError(f"switch_step={switch_step} goes with scheduler='static', not {scheduler!r}")
    if switch_step is not None and not 0 <= switch_step <= max_new_tokens:
        raise ValueError(f"switch_step={switch_step} is not possible: 0 to max_new_tokens ({max_new_tokens})")
    if not isinstance(scheduler, (str, Path)) or str(scheduler) in NAMED or Path(scheduler).is_dir():
        return
    try:
        Schedule.parse(str(scheduler))
    except ValueError as error:
        why = f": {error}" if ":" in str(scheduler) else ""
        raise ValueError(
            f"scheduler={str(scheduler)!r} is none of {', '.join(NAMED)}, a schedule such as 4:4@21,3, "
            f"or the folder of a trained scheduler{why}"
        ) from error


class Model:
    """A nested model, ready to answer.

    Attributes:
        engine: in words, how decode steps are taken on this device.
        high_bits, low_bits: what ``high``, ``low`` and ``static`` mean.
        nested: folder of its nested model, for ``pmpd.load(..., nested=)`` on another device; None if not known.
    """

    def __init__(
        self,
        model: nn.Module,
        cell: PrecisionCell,
        prompter: Prompter,
        *,
        high_bits: int,
        low_bits: int,
        engine: str,
        nested: Path | None = None,
    ) -> None:
        """Raises:
        ValueError: precisions that do not fall, or that the model does not have.
        """
        for name, bits in (("high_bits", high_bits), ("low_bits", low_bits)):
            if bits not in cell.available:
                raise ValueError(f"{name}={bits} is not a precision of this model, which has {cell.available}")
        if not low_bits < high_bits:
            raise ValueError(f"low_bits={low_bits} must be below high_bits={high_bits}")
        self.model = model
        self.cell = cell
        self.prompter = prompter
        self.high_bits, self.low_bits = high_bits, low_bits
        self.engine = engine
        self.nested = nested

    @property
    def bits(self) -> list[int]:
        """Precisions that it can decode at, rising; 16 stands for the unquantised weights."""
        return self.cell.available

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        scheduler: str | Path | Schedule | Scheduler = "static",
        max_new_tokens: int = 256,
        switch_step: int | None = None,
        raw: bool = False,
    ) -> Iterator[Piece]:
        """Answer greedily, piece by piece.

        Args:
            prompt: what the user says; or a conversation, user and model in turn, the user last.
            scheduler: ``fp16``, ``high``, ``low`` (uniform), ``static`` (prefill and steps 1 to ``switch_step`` high,
                the rest low), a schedule or its name such as ``4:4@21,3``, the folder of a trained scheduler
                (artifact of ``train_learned``), or any object with ``prefill_bits`` and ``begin``.
            max_new_tokens: at most; fewer if the model ends its answer.
            switch_step: of ``static``; a third of ``max_new_tokens`` if None.
            raw: ``prompt`` is text to be continued, with no template around it.

        Raises:
            ValueError: a scheduler that there is not, precisions that the model does not have, numbers of tokens or
                steps out of range, a conversation that does not end with the user, or a prompt that is too long for
                the model's context (a :class:`pmpd.decode.ContextError`, when the first piece is asked for).
        """
        chosen = self.scheduler(scheduler, max_new_tokens, switch_step)
        ids = self._prompt_ids(prompt, raw)
        steps = stream(self.model, self.cell, ids, chosen, max_new_tokens=max_new_tokens, eos_ids=self.prompter.eos_ids)
        return self._pieces((step.index, int(step.tokens), step.bits, max_new_tokens) for step in steps)

    def warm_up(self) -> None:
        """Two tokens at every precision: what a GPU compiles and captures when first needed is then there."""
        for bits in self.bits:
            for _ in stream(self.model, self.cell, [0], Fixed(Schedule.uniform(bits)), max_new_tokens=2, eos_ids=()):
                pass

    def scheduler(
        self, scheduler: str | Path | Schedule | Scheduler, max_new_tokens: int, switch_step: int | None = None
    ) -> Scheduler:
        """The scheduler that :meth:`generate` means by its arguments.

        Raises:
            ValueError: as there.
        """
        check_request(scheduler, max_new_tokens, switch_step)
        if isinstance(scheduler, Schedule):
            found: Scheduler = Fixed(scheduler)
        elif isinstance(scheduler, (str, Path)):
            found = self._named(str(scheduler), max_new_tokens, switch_step)
        else:
            found = scheduler
        classes = found.classes if isinstance(found, Learned) else (found.schedule,) if isinstance(found, Fixed) else ()
        wanted = {found.prefill_bits, *(bits for schedule in classes for bits in schedule.levels)}
        if missing := sorted(wanted - set(self.bits)):
            keep = "load it with keep_fp16=True (--keep-fp16 of a chat)"
            hint = keep if FP16_BITS in missing else "a higher max_bits= of load (--max-bits of a chat) may keep more"
            raise ValueError(f"scheduler={scheduler!r} needs {missing} bits, and this model has {self.bits}; {hint}")
        return found

    def _named(self, name: str, max_new_tokens: int, switch_step: int | None) -> Scheduler:
        uniform = {"fp16": FP16_BITS, "high": self.high_bits, "low": self.low_bits}
        if name in uniform:
            return Fixed(Schedule.uniform(uniform[name]))
        if name == "static":
            step = max_new_tokens // STATIC_FRACTION if switch_step is None else switch_step
            return Fixed(Schedule(self.high_bits, (self.high_bits, self.low_bits), (step,)))
        if Path(name).is_dir():
            return trained(Path(name), max_new_tokens, self.device)
        return Fixed(Schedule.parse(name))

    def _prompt_ids(self, prompt: str | Sequence[str], raw: bool) -> list[int]:
        turns = [prompt] if isinstance(prompt, str) else list(prompt)
        if raw and len(turns) == 1:
            return self.prompter.raw_ids(turns[0])
        if raw or len(turns) % 2 == 0:
            raise ValueError(
                f"a prompt of {len(turns)} texts: give one text, or a conversation (not raw) that ends with the user's"
            )
        return self.prompter.ids(turns[::2], turns[1::2])

    def _pieces(self, tokens: Iterator[tuple[int, int, int, int]]) -> Iterator[Piece]:
        """Text is held back while its last character is incomplete; what is then left comes with the last token."""
        ids: list[int] = []
        context = done = 0  # ids[context:done] precede the text to come: some tokenizers decode by neighbours
        for index, token, bits, max_new_tokens in tokens:
            ids.append(token)
            before, now = self.prompter.text(ids[context:done]), self.prompter.text(ids[context:])
            last = index + 1 == max_new_tokens or token in self.prompter.eos_ids
            text = now[len(before) :] if last or not now.endswith("\ufffd") else ""
            if text:
                context, done = done, len(ids)
            yield Piece(index, token, bits, text)


def trained(folder: Path, max_new_tokens: int, device: torch.device | str = "cpu") -> Learned:
    """The learned scheduler in an artifact of ``train_learned``, for answers of ``max_new_tokens``.

    Raises:
        ValueError: the folder is no such artifact.
    """
    if not (folder / MANIFEST).is_file() or not (folder / NETWORK_FILE).is_file():
        raise ValueError(f"{folder} holds no {NETWORK_FILE} with its {MANIFEST}: give an artifact of train_learned")
    manifest = read_json(folder / MANIFEST)
    if manifest["stage"] != TRAIN_LEARNED.name:
        raise ValueError(f"{folder} is an artifact of {manifest['stage']}: give one of {TRAIN_LEARNED.name}")
    config = manifest["config"]
    network = load_network(folder / NETWORK_FILE).to(device)
    classes = class_schedules(config["prefill_bits"], config["levels"], max_new_tokens, config["grid_parts"])
    return Learned(network, config["prefill_bits"], classes)
