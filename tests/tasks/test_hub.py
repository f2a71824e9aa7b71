"""The hub is played by stand-ins: no test here needs a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pmpd.tasks.hub import download, hub_commit
from pmpd.tasks.source import DataError, read_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRANSPORT_ERROR = HfHubHTTPError.__mro__[1]


class Hub:
    """What the two libraries are asked, and what they answer or raise."""

    def __init__(self) -> None:
        self.commit: str | Exception = COMMIT
        self.rows: list[dict[str, Any]] = []
        self.load_error: Exception | None = None
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.asked: list[tuple[str, str]] = []
        self.yielded = 0

    def dataset_info(self, _api: object, path: str, *, revision: str, timeout: float) -> Any:
        assert timeout <= 15
        self.asked.append((path, revision))
        if isinstance(self.commit, Exception):
            raise self.commit
        return Mock(sha=self.commit)

    def load_dataset(self, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((args, options))
        if self.load_error is not None:
            raise self.load_error
        return self._stream()

    def _stream(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.yielded += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()
    hub_commit.cache_clear()
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda api, path, **options: hub.dataset_info(api, path, **options)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock())
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def unreachable() -> Exception:
    return TRANSPORT_ERROR("[Errno -2] Name or service not known")


def not_found() -> Exception:
    return RepositoryNotFoundError("404 Client Error", response=Mock(headers={}, status_code=404))


def remember(cache: Path, revision: str) -> None:
    """The hub client's cache after one file of ``a/b`` was read at ``revision``."""
    folder = cache / "datasets--a--b"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / ".gitattributes").write_text("")
    (folder / "refs" / revision).parent.mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)


def test_a_revision_is_resolved_once_a_process(hub: Hub) -> None:
    assert hub_commit("a/b", "main") == COMMIT
    hub.commit = "f" * 40
    assert hub_commit("a/b", "main") == COMMIT
    assert hub.asked == [("a/b", "main")]


def test_a_commit_needs_no_network(hub: Hub) -> None:
    hub.commit = unreachable()
    assert hub_commit("a/b", "f" * 40) == "f" * 40
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["main", "refs/convert/parquet"])
def test_offline_the_commit_is_what_it_was_when_last_seen(
    hub: Hub, tmp_path: Path, revision: str, caplog: pytest.LogCaptureFixture
) -> None:
    remember(tmp_path / "cache", revision)
    hub.commit = unreachable()
    assert hub_commit("a/b", revision) == COMMIT
    assert "cannot be reached" in caplog.text


@pytest.mark.parametrize("error", [unreachable(), ConnectionError("offline mode is enabled"), TimeoutError("slow")])
def test_neither_hub_nor_cache_says_which_field_to_set(hub: Hub, error: Exception) -> None:
    hub.commit = error
    with pytest.raises(DataError) as caught:
        hub_commit("a/b", "main")
    for part in ("a/b at revision main", "data.root=DIR", "DIR/<dataset>/<split>.jsonl", "data.root=samples"):
        assert part in str(caught.value)


def test_a_data_set_that_does_not_exist_is_not_taken_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    remember(tmp_path / "cache", "main")
    hub.commit = not_found()
    with pytest.raises(DataError, match=r"is not there, or needs a login; check hub_path and hub_revision"):
        hub_commit("a/b", "main")


def test_a_commit_that_cannot_be_remembered_is_still_an_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=unreachable()))
    assert hub_commit("a/b", "main") == COMMIT


def test_download_streams_only_the_rows_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.rows = [{"text": f"row {i}\u2028x"} for i in range(100)]
    out = tmp_path / "rows.jsonl"
    assert download("a/b", "en", COMMIT, "validation", 3, out) == 3
    assert read_rows(out, ("text",)) == hub.rows[:3]
    assert hub.yielded == 3
    assert hub.calls == [(("a/b", "en"), {"split": "validation", "revision": COMMIT, "streaming": True})]


def test_download_without_a_limit_takes_every_row(hub: Hub, tmp_path: Path) -> None:
    hub.rows = [{"translation": {"en": "Yes.", "fr": "Oui."}}, {"translation": {"en": "No.", "fr": "Non."}}]
    assert download("a/b", None, COMMIT, "test", None, tmp_path / "rows.jsonl") == 2
    assert read_rows(tmp_path / "rows.jsonl", ("translation",)) == hub.rows


def test_lists_stay_lists_and_times_become_texts(hub: Hub, tmp_path: Path) -> None:
    hub.rows = [{"prompt": ["One?", "Two?"], "timestamp": datetime(2019, 4, 25, 12, 57, 54)}]
    download("a/b", None, COMMIT, "train", None, tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row == {"prompt": ["One?", "Two?"], "timestamp": "2019-04-25T12:57:54"}


def test_an_unreachable_hub_is_found_out_before_the_library_retries(hub: Hub, tmp_path: Path) -> None:
    hub.commit = unreachable()
    with pytest.raises(DataError, match=r"cannot be reached .*data\.root=DIR"):
        download("a/b", None, "main", "test", None, tmp_path / "rows.jsonl")
    assert hub.calls == []


def test_a_stream_that_breaks_leaves_no_file(hub: Hub, tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"text": "row"}
        raise ConnectionError("Server disconnected")

    hub._stream = broken  # type: ignore[method-assign]
    with pytest.raises(DataError, match="Server disconnected"):
        download("a/b", None, COMMIT, "test", None, tmp_path / "rows.jsonl")
    assert not list(tmp_path.glob("rows*"))


def test_a_full_disk_is_not_blamed_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rows = [{"text": "row"}]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught:
        download("a/b", None, COMMIT, "test", None, tmp_path / "file" / "rows.jsonl")
    assert not isinstance(caught.value, DataError)


def test_an_empty_split_is_refused_and_leaves_no_file(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one row"):
        download("a/b", None, COMMIT, "test", None, tmp_path / "rows.jsonl")
    assert not list(tmp_path.glob("rows*"))


def test_an_unknown_split_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.load_error = ValueError("Bad split: tset. Available splits: ['test']")
    with pytest.raises(DataError, match=r"configuration en with a split tset: Bad split: tset\. Available splits"):
        download("a/b", "en", COMMIT, "tset", None, tmp_path / "rows.jsonl")


def test_a_missing_data_set_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.load_error = DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")
    with pytest.raises(DataError, match="a/b at revision main is not there"):
        download("a/b", None, "main", "test", None, tmp_path / "rows.jsonl")


def test_a_data_set_that_is_a_script_names_the_parquet_export(hub: Hub, tmp_path: Path) -> None:
    hub.load_error = RuntimeError("Dataset scripts are no longer supported, but found b.py")
    with pytest.raises(DataError, match="set hub_revision=refs/convert/parquet"):
        download("a/b", None, "main", "test", None, tmp_path / "rows.jsonl")


def test_a_configuration_of_the_parquet_export_is_read_from_its_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library on a folder laid out as the export is: ``<configuration>/<split>/0000.parquet``."""
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Mock(sha=COMMIT))
    for name in ("en-fr", "ar-en"):
        for split in ("train", "test"):
            folder = tmp_path / "export" / name / split
            folder.mkdir(parents=True)
            datasets.Dataset.from_list([{"text": f"{name} {split}"}]).to_parquet(str(folder / "0000.parquet"))
    out = tmp_path / "rows.jsonl"
    download(str(tmp_path / "export"), "en-fr", COMMIT, "test", None, out)
    assert read_rows(out, ("text",)) == [{"text": "en-fr test"}]
