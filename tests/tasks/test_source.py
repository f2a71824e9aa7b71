from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pmpd.tasks.source import DataError, available, locate, read_rows
from tests.tasks.rows import cnn, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "dialogsum" / "validation.jsonl", [{"a": 1}])
    write(tmp_path / "dialogsum" / "test.jsonl.gz", [{"a": 1}])
    write(tmp_path / "c4" / "validation.jsonl", [{"a": 1}])
    return tmp_path


def test_finds_plain_and_gzipped_splits(root: Path) -> None:
    assert locate("dialogsum", "validation", str(root)) == root / "dialogsum" / "validation.jsonl"
    assert locate("dialogsum", "test", str(root)) == root / "dialogsum" / "test.jsonl.gz"


def test_no_root_means_the_hub() -> None:
    assert locate("dialogsum", "test", None) is None


def test_a_root_may_start_at_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert locate("c4", "validation", f"~/{root.name}") == root / "c4" / "validation.jsonl"


def test_a_missing_split_lists_what_is_there_and_the_near_name(root: Path) -> None:
    with pytest.raises(DataError, match=r"no dialogsum/tset\.jsonl") as caught:
        locate("dialogsum", "tset", str(root))
    assert "did you mean dialogsum/test?" in str(caught.value)
    assert "c4: validation; dialogsum: test, validation" in str(caught.value)


def test_a_missing_set_names_the_near_one(root: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean dialogsum\?"):
        locate("dialogsun", "test", str(root))


def test_nothing_is_suggested_when_nothing_is_near(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        locate("zzz", "test", str(root))
    assert "did you mean" not in str(caught.value)


def test_a_root_one_folder_too_deep_is_recognised(root: Path) -> None:
    with pytest.raises(DataError, match="give the folder above it"):
        locate("dialogsum", "test", str(root / "dialogsum"))


def test_an_empty_root_says_what_the_layout_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at all, expected DIR/<dataset>/<split>\.jsonl"):
        locate("dialogsum", "test", str(tmp_path))


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder.*data\.root=samples"):
        locate("dialogsum", "test", str(tmp_path / "nowhere"))


def test_two_files_of_one_split_are_refused(root: Path) -> None:
    write(root / "dialogsum" / "test.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="both there"):
        locate("dialogsum", "test", str(root))


def test_available_lists_only_data_files(root: Path) -> None:
    (root / "README.md").write_text("words")
    (root / "c4" / "notes.txt").write_text("words")
    assert available(root) == {"c4": ["validation"], "dialogsum": ["test", "validation"]}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_line_separators_inside_a_text_end_no_row(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one\u2028two\u2029three\x85four\x0bfive\x1csix\r\nseven"}, {"text": "é 漢字 🙂"}]
    assert read_rows(write(tmp_path / name, rows), ("text",)) == rows


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_rows(path, ("a",)) == [{"a": 1}, {"a": 2}]


def test_a_damaged_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: damaged JSON"):
        read_rows(path, ("a",))


def test_a_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match="line 1: a JSON object is expected, found list"):
        read_rows(path, ("a",))


def test_wrong_columns_show_found_and_expected(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [cnn(0), {"article": "A.", "summary": "S."}])
    with pytest.raises(DataError) as caught:
        read_rows(path, ("article", "highlights", "id"))
    assert "line 2: no column highlights, id; found article, summary, expected article, highlights, id" in str(
        caught.value
    )


def test_more_columns_than_needed_are_kept(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}]), ("a",)) == [{"a": 1, "b": 2}]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        read_rows(path, ("a",))


def test_a_truncated_gzip_says_how_far_it_was_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} {i * i} {i**3}"}) for i in range(5000)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"damaged gzip after line [1-9]\d+ .*again"):
        read_rows(path, ("text",))


def test_a_flipped_byte_in_a_gzip_is_found(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(b'{"text": "abcdefgh"}\n' * 50))
    damaged[-6] ^= 1  # in the checksum
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged gzip"):
        read_rows(path, ("text",))


def test_a_plain_file_named_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="damaged gzip"):
        read_rows(path, ("a",))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(path, ("a",))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_rows(tmp_path / "gone.jsonl", ("a",))
