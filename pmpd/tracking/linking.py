"""Makes W&B artifacts of the lineage that finished runs carry, after ``wandb sync``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pmpd.files import read_json, write_json
from pmpd.tracking.tracker import wandb_settings

log = logging.getLogger(__name__)


def link(dir: str, project: str, entity: str | None) -> list[str]:
    """Make W&B artifacts of the lineage that finished runs carry, linked by which run made and which read them; once.

    For after ``wandb sync``. An artifact is a reference to its folder in the store, never a copy. An input that no run
    told of, because its folder was gone by then, is linked by its name alone. What was sent by a version that wrote no
    lineage is skipped, and said.

    Returns:
        the runs that were linked.

    Raises:
        Exception: whatever W&B raises; what was linked before stays so, and the next call goes on from there.
    """
    import wandb

    linked = []
    entries = {path: dict(read_json(path)) for path in (Path(dir) / "sent" / project).glob("*.json")}
    known = {path.stem for path in entries}

    def read_of(kind: str, digest: str) -> Any:
        if f"{kind}-{digest}" in known:
            return f"{kind}-{digest}:latest"
        return wandb.Artifact(f"{kind}-{digest}", type=kind, metadata={"digest": digest})

    for path in sorted(entries, key=lambda p: entries[p].get("told_ns", 0)):  # the order of their making
        entry = entries[path]
        if "lineage" not in entry:
            log.warning("%s was sent without its lineage, by an earlier version; it is not linked", path.stem)
            continue
        if entry.get("linked"):
            continue
        run = wandb.init(
            project=project, entity=entity, id=path.stem, resume="must", mode="online", settings=wandb_settings(wandb)
        )
        for name, artifact in entry["lineage"].items():
            stage, _, key = name.partition("/")
            if path.stem != f"{stage}-{key}":  # the run reads it
                run.use_artifact(read_of(stage, key))
                continue
            for read in artifact["inputs"].values():
                kind, _, digest = read.partition("/")
                run.use_artifact(read_of(kind, digest))
            made = wandb.Artifact(f"{stage}-{key}", type=stage, metadata={"key": key, "inputs": artifact["inputs"]})
            if (folder := Path(artifact["path"]).absolute()).exists():  # not collected since
                made.add_reference(folder.as_uri(), checksum=False)
            run.log_artifact(made)
        run.finish()
        write_json(path, entry | {"linked": True})
        linked.append(path.stem)
    return linked
