from __future__ import annotations

import pytest
from transformers import GenerationConfig

from pmpd.models import ModelError, Prompter
from pmpd.models.prompt import TextTemplate
from tests.tiny import tiny_tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. {turn}USER: {user} ASSISTANT: {assistant}</s>"
)
PHI = "Instruct: {user}\nOutput: {assistant}\n"


def shown(prompter: Prompter, ids: list[int]) -> str:
    return prompter.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_conversation_in_vicunas_words() -> None:
    template = TextTemplate(VICUNA)
    system = VICUNA.split("{turn}")[0]
    assert template.render(["Hi"], []) == system + "USER: Hi ASSISTANT:"
    assert (
        template.render(["Hi", "Why?"], [" Hello. "]) == system + "USER: Hi ASSISTANT: Hello.</s>USER: Why? ASSISTANT:"
    )


def test_a_conversation_in_phis_words() -> None:
    assert (
        TextTemplate(PHI).render(["Hi", "Why?"], ["Hello."]) == "Instruct: Hi\nOutput: Hello.\nInstruct: Why?\nOutput:"
    )


def test_braces_in_a_message_are_only_text() -> None:
    assert TextTemplate("{user}\n{assistant}").render(["{assistant} {user} {x}"], []) == "{assistant} {user} {x}\n"


@pytest.mark.parametrize(
    "text", ["", "{user}", "{assistant}{user}", "{user}{user}{assistant}", "{user}{turn}{assistant}"]
)
def test_a_template_that_is_not_possible_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match=r"model\.prompt="):
        Prompter(tiny_tokenizer(), text)


@pytest.mark.parametrize("template", ["tokenizer", VICUNA, "<s>" + VICUNA, PHI])
def test_the_beginning_token_comes_exactly_once(template: str) -> None:
    prompter = Prompter(tiny_tokenizer(add_bos=True), template)
    for ids in (prompter.ids(["Hi"]), prompter.ids(["Hi", "Why?"], ["Hello"]), prompter.raw_ids("Once upon")):
        assert ids[0] == prompter.tokenizer.bos_token_id
        assert ids.count(prompter.tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_no_beginning_token_is_left_alone() -> None:
    prompter = Prompter(tiny_tokenizer(add_bos=False), PHI)
    assert prompter.tokenizer.bos_token_id not in prompter.ids(["Hi"])
    assert shown(prompter, prompter.raw_ids("Once upon")) == "Once upon"


def test_the_end_token_of_a_template_is_a_token() -> None:
    prompter = Prompter(tiny_tokenizer(), VICUNA)
    assert prompter.ids(["Hi", "Why?"], ["Hello"]).count(prompter.tokenizer.eos_token_id) == 1


def test_the_tokenizers_own_template() -> None:
    prompter = Prompter(tiny_tokenizer(), "tokenizer")
    ids = prompter.ids(["Hi", "Why?"], ["Hello"])
    assert shown(prompter, ids) == (
        "<s><|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n"
    )


def test_a_missing_chat_template_says_what_to_give() -> None:
    with pytest.raises(ModelError, match=r"no chat template: .* model\.prompt='USER:"):
        Prompter(tiny_tokenizer(chat_template=None), "tokenizer")


def test_a_chat_template_that_refuses_is_quoted() -> None:
    refusing = "{{ raise_exception('one turn only') }}"
    with pytest.raises(ModelError, match="refuses the conversation: one turn only"):
        Prompter(tiny_tokenizer(chat_template=refusing), "tokenizer").ids(["Hi"])


def test_ends_are_the_tokenizers_and_the_generation_configs() -> None:
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    assert Prompter(tokenizer, PHI).eos_ids == (eos,)
    assert Prompter(tokenizer, PHI, GenerationConfig(eos_token_id=7)).eos_ids == (eos, 7)
    assert Prompter(tokenizer, PHI, GenerationConfig(eos_token_id=[7, eos])).eos_ids == (eos, 7)
    tokenizer.eos_token = None
    assert Prompter(tokenizer, PHI, GenerationConfig(eos_token_id=7)).eos_ids == (7,)
    assert Prompter(tokenizer, PHI).eos_ids == ()


def test_padding_falls_back_to_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    assert Prompter(tokenizer, PHI).pad_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert Prompter(tokenizer, PHI).pad_id == tokenizer.eos_token_id


def test_text_leaves_special_tokens_out() -> None:
    prompter = Prompter(tiny_tokenizer(), PHI)
    ids = prompter.raw_ids("The answer.")
    assert prompter.text([*ids, prompter.tokenizer.eos_token_id]) == "The answer."


@pytest.mark.parametrize("template", ["tokenizer", VICUNA])
@pytest.mark.parametrize("max_tokens", [200, 201, 230])
def test_shortening_keeps_as_much_of_the_document_as_fits(template: str, max_tokens: int) -> None:
    prompter = Prompter(tiny_tokenizer(), template)
    document = "The fox — «quick» and brown — jumps. 日本語 " * 30
    turns = (f"Summarise: {document} In one sentence.", "Why?")
    short = prompter.shorten(turns, document, max_tokens)
    assert short[1] == "Why?"
    assert short[0].startswith("Summarise: ")
    assert short[0].endswith(" In one sentence.")
    kept = short[0].removeprefix("Summarise: ").removesuffix(" In one sentence.")
    assert kept
    assert document.startswith(kept)
    assert len(prompter.ids(short[:1])) <= max_tokens
    whole_word_more = document[: len(kept) + 8]
    assert len(prompter.ids([f"Summarise: {whole_word_more} In one sentence."])) > max_tokens


def test_what_fits_is_not_touched_and_what_cannot_fit_is_refused() -> None:
    prompter = Prompter(tiny_tokenizer(), PHI)
    turns = ("Summarise: a b c", "Why?")
    assert prompter.shorten(turns, "a b c", 100) == turns
    with pytest.raises(ModelError, match="without its document, and at most 4 fit"):
        prompter.shorten(turns, "a b c", 4)
    with pytest.raises(ModelError, match="nothing in it may be cut"):
        prompter.shorten(turns, "", 4)
