"""The texts shipped in the package read through the tasks that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmpd.tasks import build, locate, read_rows, role_rows
from pmpd.tasks.source import SAMPLES, available, samples_root
from pmpd.tasks.texts import COLUMNS, ROLES

EXPECTED = {
    "c4": ["validation"],
    "cnn_dailymail": ["test", "validation"],
    "dialogsum": ["test", "validation"],
    "iwslt2017-en-fr": ["test", "validation"],
    "mt_bench_prompts": ["train"],
    "own": ["test", "validation"],
}

FILES = [(name, split) for name, splits in available(samples_root()).items() for split in splits]


def test_every_expected_split_is_shipped() -> None:
    missing = {f"{name}/{split}" for name, splits in EXPECTED.items() for split in splits if (name, split) not in FILES}
    assert not missing


@pytest.mark.parametrize(("dataset", "split"), FILES)
def test_a_shipped_split_reads_with_unique_ids(dataset: str, split: str) -> None:
    path = locate(dataset, split, SAMPLES)
    assert isinstance(path, Path)
    if dataset == "c4":
        rows = read_rows(path, COLUMNS)
        texts = [text for role in ROLES for text in role_rows(rows, role)]
        assert len(set(texts)) == len(rows)
        return
    task = build(dataset)
    rows = read_rows(path, task.columns)
    samples = task.samples(rows, prompt="{document}", limit=None, min_reference_words=0, split=split)
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({sample.turns for sample in samples}) == len(samples)


@pytest.mark.parametrize("dataset", sorted(EXPECTED.keys() - {"c4"}))
def test_validation_and_test_share_no_sample(dataset: str) -> None:
    turns = [
        sample.turns[0]
        for name, split in FILES
        if name == dataset
        for sample in build(dataset).samples(
            read_rows(samples_root() / dataset / f"{split}.jsonl", build(dataset).columns),
            prompt="{document}",
            limit=None,
            min_reference_words=0,
            split=split,
        )
    ]
    assert len(set(turns)) == len(turns)
