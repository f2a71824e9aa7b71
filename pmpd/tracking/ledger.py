"""Which runs were told to W&B from here, with what content: so that nothing is told twice. Knows files, not W&B."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pmpd.files import read_json


@dataclass(frozen=True)
class Identity:
    """What makes a run the same run when it is told again, by whatever process.

    Attributes:
        run_id: W&B's, such as ``quantize-<key>``.
        content: a digest, or a key, of what it says: a run that was sent with the same content is not sent again.
    """

    run_id: str
    content: str


def was_sent(dir: str, project: str, identity: Identity) -> bool:
    """Whether a run of this identity and content was finished here before, on-line or offline."""
    try:
        return bool(read_json(ledger(dir, project, identity))["content"] == identity.content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def ledger(dir: str, project: str, identity: Identity) -> Path:
    """Where it stands that a run was sent."""
    return Path(dir) / "sent" / project / f"{identity.run_id}.json"


def remove_unsent(dir: Path, identity: Identity) -> None:
    """Remove what a process that was killed, or an earlier content, left of this run and was not uploaded yet."""
    for folder in dir.glob(f"wandb/offline-run-*-{identity.run_id}"):
        if not list(folder.glob("*.synced")):
            shutil.rmtree(folder)
