"""Where two models' answers part, and by how much the reference preferred its own token."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pmpd
from pmpd.decode import prefill
from pmpd.records import Schedule

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROMPTS = [[5, 9, 2], [7, 7, 1, 30]]
SCHEDULES = [Schedule.uniform(16), Schedule(4, (4, 3), (2,))]


@pytest.fixture
def same_tokens(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("same_tokens")


@pytest.fixture
def reference(tiny_llama: Path, tmp_path: Path) -> pmpd.Model:
    return pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None)


def test_a_model_has_its_own_tokens(same_tokens: ModuleType, reference: pmpd.Model) -> None:
    rows = same_tokens.compare(reference, reference, PROMPTS, SCHEDULES, 6)
    assert [(row.prompt, row.schedule) for row in rows] == [(k, s.name) for k in (0, 1) for s in SCHEDULES]
    assert all(row.equal == row.tokens > 0 and row.token is None for row in rows)
    assert same_tokens.summary(rows).startswith("4 of 4 answers equal")


def test_where_models_part_the_reference_says_how_near_the_other_token_was(
    same_tokens: ModuleType, reference: pmpd.Model, tiny_llama: Path, tmp_path: Path
) -> None:
    other = pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None)
    head = other.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * torch.linspace(1, -1, len(head.weight))[:, None])
    [row] = same_tokens.compare(reference, other, PROMPTS[:1], SCHEDULES[:1], 6)
    assert row.equal == 0
    logits = prefill(reference.model, reference.cell, PROMPTS[:1], 16, max_new_tokens=6).logits[0]
    assert row.token == int(logits.argmax())
    assert row.other_token != row.token
    assert (row.logit, row.other_logit) == pytest.approx(
        (float(logits.max()), float(logits[row.other_token])), rel=1e-5
    )
    assert f"{row.logit - row.other_logit:.3f} apart" in same_tokens.summary([row])


def test_the_reference_has_the_other_ones_nested_model(
    same_tokens: ModuleType, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, compared = pmpd.load, list[pmpd.Model]()

    def load_as_on_a_gpu(path: str, *, dtype: torch.dtype | None = None, **options: Any) -> pmpd.Model:
        """Where another nested model is made than on a CPU."""
        return load(path, dtype=dtype, calibration="samples" if dtype is None else None, **options)

    monkeypatch.setattr(pmpd, "load", load_as_on_a_gpu)
    monkeypatch.setattr(same_tokens, "compare", lambda reference, other, *_: compared.extend([reference, other]) or [])
    out = tmp_path / "rows.csv"
    options = ["--model", str(tiny_llama), "--store", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["same_tokens.py", *options, "--out", str(out), "--commit", "x"])
    same_tokens.main()
    assert compared[0].nested == compared[1].nested is not None
    dtypes = [next(model.model.parameters()).dtype for model in compared]
    assert dtypes == [torch.float32, torch.bfloat16]
