from __future__ import annotations

import logging

import pytest
import torch

from pmpd.tasks.source import DataError
from pmpd.tasks.texts import ROLES, role_rows, seed_prompts, windows

EOS, BOS = 1, 2


def encode(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def numbers(start: int, count: int) -> str:
    return " ".join(str(n) for n in range(start, start + count))


def test_the_roles_share_no_row_and_leave_none_out() -> None:
    rows = [{"text": f"text {i}"} for i in range(8)]
    found = {role: role_rows(rows, role) for role in ROLES}
    assert found["seeds"] == ["text 0", "text 3", "text 6"]
    assert found["perplexity"] == ["text 1", "text 4", "text 7"]
    assert found["calibration"] == ["text 2", "text 5"]


def test_more_rows_move_no_row_to_another_role() -> None:
    rows = [{"text": f"text {i}"} for i in range(20)]
    for role in ROLES:
        assert role_rows(rows, role)[:2] == role_rows(rows[:7], role)[:2]


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="role='search' is not one of seeds, perplexity, calibration"):
        role_rows([{"text": "a"}], "search")


def test_a_role_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="2 rows of text leave none for calibration"):
        role_rows([{"text": "a"}, {"text": "b"}], "calibration")


def test_an_empty_text_is_named_by_its_row() -> None:
    with pytest.raises(DataError, match="row 4: text is empty"):
        role_rows([{"text": "a"}] * 4 + [{"text": " "}], "perplexity")


def test_windows_are_consecutive_cuts_of_documents_with_eos_between() -> None:
    found = windows(["10 11 12", "20 21", "30 31 32 33"], encode, 2, 5, role="perplexity", eos_id=EOS)
    assert found.dtype == torch.int64
    assert found.tolist() == [[10, 11, 12, EOS, 20], [21, EOS, 30, 31, 32]]


def test_windows_put_bos_before_every_document() -> None:
    found = windows(["10 11", "20 21"], encode, 1, 7, role="perplexity", bos_id=BOS, eos_id=EOS)
    assert found.tolist() == [[BOS, 10, 11, EOS, BOS, 20, 21]]


def test_windows_need_no_special_tokens() -> None:
    assert windows(["10 11", "20 21"], encode, 1, 4, role="calibration").tolist() == [[10, 11, 20, 21]]


def test_more_windows_begin_with_the_same_ones() -> None:
    texts = [numbers(100 * i, 7) for i in range(1, 20)]
    few, many = (windows(texts, encode, n, 8, role="perplexity", eos_id=EOS) for n in (3, 10))
    assert torch.equal(few, many[:3])


def test_no_more_texts_are_encoded_than_needed() -> None:
    seen = []

    def watched(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    windows([numbers(10, 6), numbers(20, 6), numbers(30, 6)], watched, 1, 10, role="perplexity")
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("role", "field"), [("perplexity", "budget.search_window"), ("calibration", "budget.calibration_window")]
)
def test_too_little_text_says_how_much_there_is_and_what_to_lower(role: str, field: str) -> None:
    with pytest.raises(DataError) as caught:
        windows([numbers(10, 11), numbers(30, 12)], encode, 4, 10, role=role, eos_id=EOS)
    message = str(caught.value)
    assert "need 40 tokens, the 2 texts have 24" in message
    assert f"lower {field}s (at most 2 are possible) or {field}_tokens (at most 6)" in message


def test_exactly_enough_text_is_enough() -> None:
    assert windows([numbers(10, 20)], encode, 2, 10, role="perplexity").shape == (2, 10)


def test_seed_prompts_are_beginnings_of_allowed_length() -> None:
    texts = [numbers(1000 * i, 40 + i) for i in range(200)]
    prompts = seed_prompts(texts, encode, 200, max_tokens=64, seed=0)
    for text, prompt in zip(texts, prompts, strict=True):
        assert prompt == encode(text)[: len(prompt)]
        assert 32 <= len(prompt) <= 64
    assert {32, 64} <= {len(prompt) for prompt in prompts}  # both ends are reached


def test_seed_prompts_depend_on_the_seed_and_on_nothing_else() -> None:
    texts = [numbers(1000 * i, 300) for i in range(20)]
    first = seed_prompts(texts, encode, 20, max_tokens=256, seed=3)
    assert seed_prompts(texts, encode, 20, max_tokens=256, seed=3) == first
    assert seed_prompts(texts, encode, 5, max_tokens=256, seed=3) == first[:5]
    assert seed_prompts(texts, encode, 20, max_tokens=256, seed=4) != first


def test_short_texts_are_skipped_and_the_shortest_allowed_is_kept_whole() -> None:
    texts = [numbers(100, 31), numbers(200, 32), numbers(300, 5)]
    assert seed_prompts(texts, encode, 1, max_tokens=64, seed=0) == [encode(texts[1])]


def test_fewer_prompts_than_asked_for_are_logged_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(seed_prompts([numbers(0, 50), "1 2 3"], encode, 4, max_tokens=40, seed=0)) == 1
    assert "4 seed prompts asked for, 1 found (1 texts have fewer than 32 tokens)" in caplog.text


def test_no_text_long_enough_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 2 texts has 32 tokens"):
        seed_prompts(["1 2", "3"], encode, 4, max_tokens=40, seed=0)


def test_a_longest_cut_below_the_shortest_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens=16 must be at least min_tokens=32"):
        seed_prompts([numbers(0, 50)], encode, 1, max_tokens=16, seed=0)
