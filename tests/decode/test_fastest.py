from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pmpd.decode.captured import CapturedStep
from pmpd.decode.fastest import fastest
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama_step import LlamaStep
from tests.decode.plain import tiny
from tests.decode.test_llama import nested


def test_on_a_cpu_a_model_is_as_it_is_and_claims_nothing(tmp_path: Path) -> None:
    model: Any = tiny(tmp_path, "llama")
    cell = nested(model)
    same, same_cell, words = fastest(model, cell, "cpu")
    assert same is model
    assert same_cell is cell
    assert "bits save no time" in words


def test_dynamic_rope_is_launched_by_the_cpu_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for a GPU: nothing moves there."""
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    model: Any = tiny(tmp_path, "llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    same, _, words = fastest(model, None, "cuda")
    assert same is model
    assert "launched by the CPU" in words
    assert "no graphs for this model, so the CPU sets the pace: llama's rotary embedding is dynamic" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("family", "dtype", "body", "said"),
    [
        ("llama_gqa", torch.float16, LlamaStep, "fused kernels"),
        ("qwen2", torch.bfloat16, LlamaStep, "fused kernels"),
        ("llama", torch.float32, CapturedStep, "own code under CUDA graphs, on dequantised weights"),
        ("phi", torch.float16, CapturedStep, "own code under CUDA graphs"),
    ],
)
def test_on_a_gpu_it_is_the_fastest_there_is(
    tmp_path: Path, family: str, dtype: torch.dtype, body: type, said: str
) -> None:
    model: Any = tiny(tmp_path, family).to(dtype)
    fast, cell, words = fastest(model, nested(model), "cuda")
    assert isinstance(fast, GraphedModel)
    assert isinstance(fast.body, body)
    assert said in words
    assert cell is not None
    assert cell.available == [2, 3, 4, 16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cannot_be_captured_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model: Any = tiny(tmp_path, "mistral").to(torch.float16)
    model.config.sliding_window = 6
    same, _, words = fastest(model, None, "cuda")
    assert same is model
    assert "launched by the CPU" in words
    assert "sliding window of 6 tokens" in caplog.text
