"""What the data sets' rules have in common, and what each does with its own columns."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pmpd.records import Sample
from pmpd.tasks import TASKS, DataError, build
from tests.tasks.rows import PROMPT, cnn, dialogue, own, pair, question

ROWS: dict[str, list[dict[str, Any]]] = {
    "cnn_dailymail": [cnn(i) for i in range(5)],
    "dialogsum": [dialogue(f"dev_{i}", of=f"Talk {i}") for i in range(5)],
    "iwslt2017-en-fr": [pair(f"Sentence number {i}.") for i in range(5)],
    "mt_bench_prompts": [question(i) for i in range(81, 86)],
    "own": [own(i) for i in range(5)],
}


def samples(
    dataset: str, rows: list[dict[str, Any]], limit: int | None = None, words: int = 0, prompt: str = PROMPT
) -> list[Sample]:
    return build(dataset).samples(rows, prompt=prompt, limit=limit, min_reference_words=words, split="test")


def test_every_task_is_covered_here() -> None:
    assert ROWS.keys() == TASKS.keys()


def test_an_unknown_data_set_names_the_known_and_the_near() -> None:
    with pytest.raises(DataError, match=r"not one of cnn_dailymail, .*did you mean dialogsum\?"):
        build("dialogsm")


@pytest.mark.parametrize("dataset", TASKS)
def test_the_limit_takes_the_first_samples(dataset: str) -> None:
    whole = samples(dataset, ROWS[dataset])
    assert len(whole) == 5
    assert samples(dataset, ROWS[dataset], limit=2) == whole[:2]


@pytest.mark.parametrize("dataset", TASKS)
def test_ids_are_unique_texts(dataset: str) -> None:
    ids = [sample.id for sample in samples(dataset, ROWS[dataset])]
    assert len(set(ids)) == 5
    assert all(isinstance(sample_id, str) for sample_id in ids)


@pytest.mark.parametrize("dataset", TASKS)
def test_rows_have_the_columns_that_the_task_declares(dataset: str) -> None:
    assert set(build(dataset).columns) <= ROWS[dataset][0].keys()


@pytest.mark.parametrize("dataset", TASKS)
def test_the_instruction_goes_around_the_document_and_other_braces_stay(dataset: str) -> None:
    turn = samples(dataset, ROWS[dataset])[0].turns[0]
    assert turn.startswith("Do it {now}:\n")
    assert turn.endswith("\nDone:")


@pytest.mark.parametrize("dataset", ["cnn_dailymail", "dialogsum", "iwslt2017-en-fr", "own"])
def test_the_document_is_a_part_of_the_turn_that_may_be_shortened(dataset: str) -> None:
    for sample in samples(dataset, ROWS[dataset]):
        assert sample.turns == (PROMPT.replace("{document}", sample.document),)
        assert sample.document


def test_a_document_that_looks_like_a_prompt_is_not_filled_in_twice() -> None:
    (sample,) = samples("cnn_dailymail", [cnn(0, article="Use {document} and {0}.")])
    assert sample.turns[0] == "Do it {now}:\nUse {document} and {0}.\nDone:"


@pytest.mark.parametrize("prompt", ["no place", "{document} and {document}"])
def test_a_prompt_needs_one_place_for_the_document(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"task\.prompt=.*exactly once"):
        samples("cnn_dailymail", ROWS["cnn_dailymail"], prompt=prompt)


def test_fewer_samples_than_asked_for_are_logged_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(samples("cnn_dailymail", ROWS["cnn_dailymail"], limit=9)) == 5
    assert "9 samples asked for, 5 found" in caplog.text


def test_as_many_samples_as_asked_for_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    samples("cnn_dailymail", ROWS["cnn_dailymail"], limit=5)
    assert not caplog.records


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        samples("cnn_dailymail", ROWS["cnn_dailymail"], limit=0)


@pytest.mark.parametrize("dataset", TASKS)
def test_no_rows_are_an_error(dataset: str) -> None:
    with pytest.raises(DataError, match="no samples"):
        samples(dataset, [])


def test_an_id_that_occurs_twice_is_named() -> None:
    with pytest.raises(DataError, match=f"id {0:040x} occurs twice"):
        samples("cnn_dailymail", [cnn(0), cnn(1), cnn(0)])


@pytest.mark.parametrize(
    ("dataset", "row", "named"),
    [
        ("cnn_dailymail", cnn(7, article=" \n"), f"sample {7:040x}: article is empty"),
        ("cnn_dailymail", cnn(7, highlights=""), "highlights is empty"),
        ("cnn_dailymail", cnn(7, article=None), "article must be text, found NoneType"),
        ("dialogsum", dialogue("test_3_2", of="x", summary=""), "sample test_3_2: summary is empty"),
        ("dialogsum", dialogue("dev_3", of="x") | {"dialogue": ""}, "sample dev_3: dialogue is empty"),
        ("iwslt2017-en-fr", pair("Yes.", ""), r"sample test_0: translation\.fr is empty"),
        ("iwslt2017-en-fr", pair(""), r"translation\.en is empty"),
        ("iwslt2017-en-fr", {"translation": {"de": "Ja.", "en": "Yes."}}, "must have en and fr, found de, en"),
        ("iwslt2017-en-fr", {"translation": "Yes."}, "must have en and fr, found str"),
        ("mt_bench_prompts", question(81, prompt=["What?", ""]), r"sample 81: prompt\[1\] is empty"),
        ("mt_bench_prompts", question(81, prompt="What?"), "must be a list of questions, found str"),
        ("mt_bench_prompts", question(81, prompt=[]), "must be a list of questions"),
        ("own", own(0, document=""), "sample test_0: document is empty"),
        ("own", own(0, id="mine", reference=["Yes.", 3]), "sample mine: reference must be text, found int"),
        ("own", own(0, reference=None), "sample test_0: reference must be text, found NoneType"),
    ],
)
def test_a_damaged_sample_is_named(dataset: str, row: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        samples(dataset, [row])


def test_cnn_highlights_stay_as_they_are() -> None:
    (sample,) = samples("cnn_dailymail", [cnn(3)])
    assert sample == Sample(
        f"{3:040x}", ("Do it {now}:\nArticle 3.\nDone:",), ("High 3 .\nLight .",), document="Article 3."
    )


def test_the_three_rows_of_a_dialogue_are_one_sample_with_three_references() -> None:
    rows = [dialogue(f"test_{d}_{r}", of=f"Talk {d}", summary=f"S{d}{r}.") for d in (0, 1, 10) for r in (1, 2, 3)]
    found = samples("dialogsum", rows)
    assert [sample.id for sample in found] == ["test_0", "test_1", "test_10"]
    assert [sample.references for sample in found] == [
        ("S01.", "S02.", "S03."),
        ("S11.", "S12.", "S13."),
        ("S101.", "S102.", "S103."),
    ]


def test_a_dialogue_limit_counts_dialogues_and_keeps_all_their_references() -> None:
    rows = [dialogue(f"test_{d}_{r}", of=f"Talk {d}") for d in range(4) for r in (1, 2, 3)]
    found = samples("dialogsum", rows, limit=2)
    assert [len(sample.references) for sample in found] == [3, 3]


def test_neighbours_with_one_summary_each_stay_apart_even_with_equal_dialogues() -> None:
    found = samples("dialogsum", [dialogue("dev_0", of="Same"), dialogue("dev_1", of="Same")])
    assert [sample.id for sample in found] == ["dev_0", "dev_1"]


def test_rows_of_one_id_with_different_dialogues_are_refused() -> None:
    with pytest.raises(DataError, match="sample test_0_2: its dialogue is not that of the other rows of test_0"):
        samples("dialogsum", [dialogue("test_0_1", of="One"), dialogue("test_0_2", of="Two")])


def test_rows_of_one_dialogue_that_are_not_adjacent_are_refused() -> None:
    rows = [dialogue("test_0_1", of="A"), dialogue("test_1_1", of="B"), dialogue("test_0_2", of="A")]
    with pytest.raises(DataError, match="id test_0 occurs twice"):
        samples("dialogsum", rows)


def test_iwslt_translates_french_to_english() -> None:
    (sample,) = samples("iwslt2017-en-fr", [pair("Hello all.", "Bonjour à tous.")])
    assert sample.document == "Bonjour à tous."
    assert sample.references == ("Hello all.",)


def test_iwslt_keeps_references_of_strictly_more_words_and_numbers_rows_before_that() -> None:
    rows = [pair("one two three"), pair("one two  three\u00a0four"), pair("one"), pair("a b c d e")]
    found = samples("iwslt2017-en-fr", rows, words=3)
    assert [sample.id for sample in found] == ["test_1", "test_3"]


def test_the_word_rule_looks_at_the_english_only() -> None:
    rows = [pair("Short.", "un deux trois quatre cinq"), pair("one two three four", "Court.")]
    assert [sample.id for sample in samples("iwslt2017-en-fr", rows, words=3)] == ["test_1"]


def test_the_limit_counts_after_the_word_rule() -> None:
    rows = [pair("one"), pair("one two"), pair("one"), pair("one two"), pair("one two")]
    assert [sample.id for sample in samples("iwslt2017-en-fr", rows, limit=2, words=1)] == ["test_1", "test_3"]


def test_a_word_rule_that_leaves_nothing_is_an_error_with_numbers() -> None:
    with pytest.raises(DataError, match=r"no samples \(5 left out by task.min_reference_words=99\)"):
        samples("iwslt2017-en-fr", ROWS["iwslt2017-en-fr"], words=99)


def test_mt_bench_has_both_turns_a_category_and_nothing_to_shorten() -> None:
    (sample,) = samples("mt_bench_prompts", [question(81)], prompt="{document}")
    assert sample == Sample("81", ("What is 81?", "And why?"), category="math")


def test_a_word_rule_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="mt_bench_prompts has no references"):
        samples("mt_bench_prompts", ROWS["mt_bench_prompts"], words=5)


def test_with_several_references_the_shortest_counts() -> None:
    rows = [dialogue("test_0_1", of="A", summary="one two three"), dialogue("test_0_2", of="A", summary="one")]
    rows.append(dialogue("test_1_1", of="B", summary="one two three"))
    assert [sample.id for sample in samples("dialogsum", rows, words=2)] == ["test_1"]


def test_own_texts_have_one_reference_or_several_or_none_at_all() -> None:
    one, several = samples("own", [own(0), own(1, id="mine", reference=["A.", "B."])])
    assert one == Sample("test_0", (PROMPT.replace("{document}", "Text 0."),), ("Reference 0.",), document="Text 0.")
    assert (several.id, several.references) == ("mine", ("A.", "B."))
    without = [{"document": "Text."}, {"document": "Another."}]
    assert [sample.references for sample in samples("own", without)] == [(), ()]
    with pytest.raises(DataError, match="sample test_2: some rows have a reference and some have none"):
        samples("own", [*without, own(2)])
