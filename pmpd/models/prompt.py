"""Turns a conversation into the tokens a model is asked to continue, by the model's own convention.

A template is either the word ``tokenizer`` (the chat template that came with the tokenizer), or text in which
``{user}`` and then ``{assistant}`` stand once each. That text is repeated for every turn of a conversation; the last
turn stops where ``{assistant}`` stands, and spaces just before it go too, since most models write a space together
with the word that follows. What comes before an optional ``{turn}`` is written once, at the beginning::

    {user}{assistant}                                              no convention: the model continues the message
    Instruct: {user}\nOutput: {assistant}\n                        Phi-1.5
    A chat ... questions. {turn}USER: {user} ASSISTANT: {assistant}</s>      Vicuna

Whatever the template, the tokenizer's beginning-of-sequence token comes first exactly once if the tokenizer is one
that adds it or the template writes it, else not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pmpd.models.errors import ModelError

TOKENIZER = "tokenizer"
USER, ASSISTANT, TURN = "{user}", "{assistant}", "{turn}"


class TextTemplate:
    """The small template language of this module.

    Raises:
        ModelError: ``{user}`` and ``{assistant}`` are not there once each, in that order.
    """

    def __init__(self, text: str) -> None:
        head, _, turn = text.rpartition(TURN)
        counts = (turn.count(USER), turn.count(ASSISTANT), head.count(USER) + head.count(ASSISTANT) + head.count(TURN))
        if counts != (1, 1, 0) or turn.index(USER) > turn.index(ASSISTANT):
            raise ModelError(
                f"prompt {text!r} (model.prompt= of a run, --prompt of a chat) is not possible: give {TOKENIZER!r}, or "
                f"text with one {USER} and then one {ASSISTANT}, after a {TURN} if there is one"
            )
        self.head = head
        self.before, rest = turn.split(USER)
        self.between, self.after = rest.split(ASSISTANT)

    def render(self, turns: Sequence[str], answers: Sequence[str]) -> str:
        """The conversation up to where the next answer starts."""
        done = "".join(
            self.before + turn + self.between + answer.strip() + self.after
            for turn, answer in zip(turns[:-1], answers, strict=True)
        )
        return self.head + done + self.before + turns[-1] + self.between.rstrip(" ")


class Prompter:
    """Prompts for one model.

    Attributes:
        eos_ids: tokens that end an answer: the tokenizer's and the generation config's.
        pad_id: a token to fill shorter rows of a batch with; never looked at.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, generation: GenerationConfig | None = None
    ) -> None:
        """
        Args:
            template: ``tokenizer`` or text, see the module.
            generation: the model's ``generation_config``; chat models name further end tokens in it.

        Raises:
            ModelError: a template that is not possible, or ``tokenizer`` without a chat template.
        """
        if template == TOKENIZER and not tokenizer.chat_template:
            raise ModelError(
                "prompt 'tokenizer', but this tokenizer has no chat template: give the model's prompt as text, "
                f"for example model.prompt='USER: {USER} ASSISTANT: {ASSISTANT}</s>' (--prompt of a chat)"
            )
        self.tokenizer = tokenizer
        self._template = None if template == TOKENIZER else TextTemplate(template)
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and _encode(tokenizer, "a", special=True)[0] == bos
        extra = generation.eos_token_id if generation is not None else None
        extra = [extra] if isinstance(extra, int) else extra or []
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids: tuple[int, ...] = tuple(sorted({*own, *extra}))
        first_eos = own[0] if own else 0
        self.pad_id: int = first_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def ids(self, turns: Sequence[str], answers: Sequence[str] = ()) -> list[int]:
        """A conversation up to where the model should answer the last of ``turns``.

        Args:
            turns: user messages, at least one.
            answers: what the model said to all but the last.

        Raises:
            ModelError: the tokenizer's chat template refuses the conversation.
        """
        assert len(turns) == len(answers) + 1, "one answer to each turn but the last"
        return self._encode_once(self._render(turns, answers))

    def raw_ids(self, text: str) -> list[int]:
        """Text to be continued, with no template around it."""
        return self._encode_once(text)

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def shorten(self, turns: Sequence[str], document: str, max_tokens: int) -> tuple[str, ...]:
        """``turns`` with the end of ``document`` cut out of the first, so that the prompt of that turn is at most
        ``max_tokens`` tokens; unchanged if it is already.

        What is left of the document is a prefix of it, as long as fits.

        Raises:
            ModelError: too long even without the document, or there is none to cut.
        """

        def length(first: str) -> int:
            return len(self.ids([first]))

        first = turns[0]
        if (full := length(first)) <= max_tokens:
            return tuple(turns)
        if not document or document not in first:
            raise ModelError(f"a prompt of {full} tokens, at most {max_tokens} fit, and nothing in it may be cut")
        before, after = first.split(document, 1)

        def keeping(num_chars: int) -> str:
            return before + document[:num_chars].rstrip() + after

        fits, too_long = 0, len(document)
        if (least := length(keeping(fits))) > max_tokens:
            raise ModelError(f"a prompt of {least} tokens without its document, and at most {max_tokens} fit")
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if length(keeping(middle)) <= max_tokens:
                fits = middle
            else:
                too_long = middle
        return (keeping(fits), *turns[1:])

    def _render(self, turns: Sequence[str], answers: Sequence[str]) -> str:
        if self._template is not None:
            return self._template.render(turns, answers)
        messages = [{"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ModelError(f"the tokenizer's chat template refuses the conversation: {error}") from error
        return str(rendered)

    def _encode_once(self, text: str) -> list[int]:
        ids = _encode(self.tokenizer, text, special=False)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._adds_bos and ids[:1] != [bos] else ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # verbose=False: a text longer than the context is not the tokenizer's business.
    ids: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(ids)
