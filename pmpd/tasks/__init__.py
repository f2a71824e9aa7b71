"""Data sets: where their rows are, and how rows become samples. No model is known here."""

from __future__ import annotations

import difflib

from pmpd.tasks.base import Task
from pmpd.tasks.cnn_dailymail import CnnDailyMail
from pmpd.tasks.dialogsum import DialogSum
from pmpd.tasks.hub import download, hub_commit
from pmpd.tasks.iwslt import Iwslt
from pmpd.tasks.mt_bench import MtBench
from pmpd.tasks.own import Own
from pmpd.tasks.source import DataError, locate, read_rows
from pmpd.tasks.texts import role_rows, seed_prompts, windows

__all__ = [
    "TASKS",
    "DataError",
    "Task",
    "build",
    "download",
    "hub_commit",
    "locate",
    "read_rows",
    "role_rows",
    "seed_prompts",
    "windows",
]

TASKS: dict[str, Task] = {
    "cnn_dailymail": CnnDailyMail(),
    "dialogsum": DialogSum(),
    "iwslt2017-en-fr": Iwslt(),
    "mt_bench_prompts": MtBench(),
    "own": Own(),
}


def build(dataset: str) -> Task:
    """The rules of a data set.

    Raises:
        DataError: there are none for this name.
    """
    if dataset in TASKS:
        return TASKS[dataset]
    near = difflib.get_close_matches(dataset, TASKS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"task.dataset={dataset} is not one of {', '.join(TASKS)}{hint}")
