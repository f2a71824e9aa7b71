"""The Hugging Face hub: which commit a revision means, and the rows of a split as a local file.

Knows nothing of tasks or columns. ``datasets`` and ``huggingface_hub`` are imported when first used,
so that a run on local files needs neither a network nor the seconds of their import.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pmpd.artifacts import write_jsonl
from pmpd.tasks.source import LAYOUT, DataError

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""For the one request that finds out whether the hub answers; ``datasets`` itself would try for 20 to 100 s."""

PARQUET_REVISION = "refs/convert/parquet"
"""Where the hub keeps its own parquet export of every data set, among them those that are a script."""

_MARKER = ".gitattributes"  # in every repository of the hub, and small


@cache
def hub_commit(hub_path: str, revision: str) -> str:
    """The commit that ``revision`` means now; without a network, what it meant when last asked.

    Asked once a process, so that every cell of a plan means the same commit. The answer is remembered in the
    local hub cache too, so that a finished experiment can be read offline.

    Raises:
        DataError: no such data set or revision, or neither hub nor cache has an answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = _ask(hub_path, revision)
    except _network_errors() as error:
        cached = None if _is_answer(error) else _cached_commit(hub_path, revision)
        if cached is None:
            raise _explain(error, hub_path, revision) from error
        log.warning(
            "the hub cannot be reached; %s at %s is taken to be %s, as when last seen", hub_path, revision, cached
        )
        return cached
    _remember(hub_path, revision)
    return commit


def download(
    hub_path: str, hub_config: str | None, revision: str, split: str, max_rows: int | None, out_file: Path
) -> int:
    """Stream the first ``max_rows`` rows (None: all) of a split into a JSONL file; returns how many there were.

    ``out_file`` appears whole or not at all.

    Raises:
        DataError: the hub cannot be reached, or has no such data set, configuration, revision or split.
    """
    try:
        _ask(hub_path, revision)
        stream = _open_stream(hub_path, hub_config, revision, split)
    except _load_errors() as error:
        raise _explain(error, hub_path, revision, hub_config, split) from error
    num_rows = 0

    def counted() -> Iterator[Any]:
        nonlocal num_rows
        try:
            rows = islice(stream, max_rows)
            for row in tqdm(rows, desc=f"{hub_path} {split}", total=max_rows, unit="row", disable=None, leave=False):
                num_rows += 1
                yield _plain(row)
        except _load_errors() as error:
            raise _explain(error, hub_path, revision, hub_config, split) from error
        if num_rows == 0:
            raise DataError(f"{hub_path}, split {split}: the hub has not one row")

    write_jsonl(out_file, counted())
    log.info("%s, split %s: %d rows from the hub", hub_path, split, num_rows)
    return num_rows


def _open_stream(hub_path: str, hub_config: str | None, revision: str, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(hub_path, hub_config, split=split, revision=revision, streaming=True)
    except ValueError as error:
        # The parquet export has no card that names its configurations: there they are folders.
        if hub_config is None or "['default']" not in str(error):
            raise
        return load_dataset(hub_path, data_dir=hub_config, split=split, revision=revision, streaming=True)


def _ask(hub_path: str, revision: str) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(hub_path, revision=revision, timeout=TIMEOUT_S).sha
    assert commit is not None
    return commit


def _cached_commit(hub_path: str, revision: str) -> str | None:
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(
        hub_path, _MARKER, cache_dir=constants.HF_HUB_CACHE, revision=revision, repo_type="dataset"
    )
    return Path(path).parent.name if isinstance(path, str) else None


def _remember(hub_path: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(hub_path, _MARKER, repo_type="dataset", revision=revision)
    except _network_errors() as error:
        log.debug("the commit of %s at %s is not remembered: %s", hub_path, revision, error)


def _network_errors() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Its base is the root error of whichever HTTP library this version of the hub client uses.
    return OSError, HfHubHTTPError.__mro__[1]


def _load_errors() -> tuple[type[BaseException], ...]:
    from datasets.exceptions import DatasetsError

    return *_network_errors(), DatasetsError, ValueError, RuntimeError


def _is_answer(error: BaseException) -> bool:
    """Whether the hub did answer, that there is no such thing."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | DatasetNotFoundError)


def _explain(
    error: BaseException, hub_path: str, revision: str, hub_config: str | None = None, split: str | None = None
) -> DataError:
    local = f"or give local files with data.root=DIR ({LAYOUT}), or data.root=samples"
    asked = f"hub data set {hub_path} at revision {revision}"
    if isinstance(error, DataError):
        return error
    if _is_answer(error):
        return DataError(
            f"{asked} is not there, or needs a login; check hub_path and hub_revision of the task "
            f"(text_hub_path and text_hub_revision of the budget), {local}"
        )
    if isinstance(error, RuntimeError) and "script" in str(error):
        return DataError(f"{asked} is a script, which is not run; set hub_revision={PARQUET_REVISION}, {local}")
    if isinstance(error, ValueError | RuntimeError):
        return DataError(f"{asked} has no configuration {hub_config} with a split {split}: {error}")
    return DataError(
        f"{asked} cannot be read: the hub cannot be reached ({error or type(error).__name__}); "
        f"try again with a network, {local}"
    )


def _plain(value: Any) -> Any:
    """The value as JSON has it: times become ISO texts."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return value
