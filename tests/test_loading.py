from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pmpd
from pipelines.plan import Planner
from pmpd.artifacts import Store
from pmpd.loading import _recipe, default_store
from pmpd.models import resolve
from pmpd.quant import NestedLinear
from pmpd.stages.inputs import model_input
from tests.pipelines.cells import cell
from tests.tiny import tiny_model_dir

PROMPT = "The quick brown fox"


def answer(model: pmpd.Model, scheduler: str = "static") -> list[tuple[int, int]]:
    return [(piece.token, piece.bits) for piece in model.generate(PROMPT, scheduler=scheduler, max_new_tokens=12)]


def test_a_model_is_quantised_once_and_found_again(tmp_path: Path, tiny_llama: Path) -> None:
    store = tmp_path / "store"
    model = pmpd.load(tiny_llama, store=store, device="cpu", parent_bits=4, low_bits=2)
    assert model.bits == [2, 3, 4, 16]
    assert "bits save no time" in model.engine
    (made,) = (store / "quantize").glob("*/artifact.json")
    written = made.stat().st_mtime_ns
    again = pmpd.load(str(tiny_llama), store=store, device="cpu", parent_bits=4, low_bits=2)
    assert made.stat().st_mtime_ns == written
    assert answer(again) == answer(model)
    assert model.nested == again.nested == made.parent
    given = pmpd.load(tiny_llama, nested=model.nested, store=tmp_path / "other", device="cpu", low_bits=2)
    assert answer(given) == answer(model)
    assert not (tmp_path / "other" / "quantize").exists()


def test_without_calibration_no_text_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    model = pmpd.load(tiny_llama, store=tmp_path, device="cpu", parent_bits=4, calibration=None)
    assert model.bits == [2, 3, 4, 16]
    assert not (tmp_path / "sensitivity").exists()
    assert not (tmp_path / "texts").exists()
    with pytest.raises(ValueError, match="calibration='c4'"):
        pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration="c4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"high_bits": 5, "parent_bits": 4}, r"high_bits=5: .* both of 2\.\.4"),
        ({"low_bits": 1}, "low_bits=1"),
        ({"low_bits": 4}, "low_bits must be below high_bits"),
        ({"high_bits": 6, "max_bits": 5}, r"both of 2\.\.5"),
        ({"high_bits": 16, "keep_fp16": False}, "high_bits=16"),
        ({"parent_bits": 9}, "parent_bits=9"),
    ],
)
def test_precisions_are_checked_before_anything_is_made(
    tmp_path: Path, tiny_llama: Path, bits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None, **bits)
    assert not (tmp_path / "quantize").exists()


def test_precisions_of_a_nested_folder_are_its_own(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"store": tmp_path, "device": "cpu", "calibration": None}
    pmpd.load(tiny_llama, parent_bits=4, high_bits=16, **options)
    (made,) = (tmp_path / "quantize").glob("*/artifact.json")
    monkeypatch.setattr("pmpd.loading.load_weights", lambda *_: pytest.fail("the model was read first"))
    with pytest.raises(ValueError, match=r"high_bits=6: .* both of 2\.\.4"):
        pmpd.load(tiny_llama, nested=made.parent, high_bits=6, **options)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_done(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"device={device}: PyTorch sees no CUDA device; use device=cpu"):
        pmpd.load(tiny_llama, store=tmp_path / "store", device=device)
    assert not (tmp_path / "store").exists()


def test_a_device_that_is_none_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    for device in ("gpu", "mps"):
        with pytest.raises(ValueError, match=rf"device={device} is not possible: cuda .* or cpu"):
            pmpd.load(tiny_llama, store=tmp_path / "store", device=device)
    assert not (tmp_path / "store").exists()


def test_originals_can_be_dropped(tmp_path: Path, tiny_llama: Path) -> None:
    whole = pmpd.load(tiny_llama, store=tmp_path, device="cpu", parent_bits=4)
    lean = pmpd.load(tiny_llama, store=tmp_path, device="cpu", parent_bits=4, keep_fp16=False)
    assert lean.bits == [2, 3, 4]
    assert all(m.weight is None for m in lean.model.modules() if isinstance(m, NestedLinear))
    assert answer(lean) == answer(whole)
    with pytest.raises(ValueError, match=r"needs \[16\] bits.*keep_fp16=True"):
        lean.generate(PROMPT, scheduler="fp16")


def test_the_pipelines_store_has_the_same_recipe(tmp_path: Path, tiny_llama: Path) -> None:
    config = cell(
        "model=hf", f"model.path={tiny_llama}", "model.dtype=float32", "data=samples", "budget=quick", "device=cpu"
    )
    store = Store(tmp_path)
    planned = Planner(config, store).nested
    own = _recipe(model_input(resolve(str(tiny_llama)), None), "samples", tmp_path / "digests.json", False, 2, 8, False)  # type: ignore[arg-type]
    assert own.key == planned.key


def test_a_model_without_a_chat_template_continues_its_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_model_dir(tmp_path, "llama", chat_template=None)
    model = pmpd.load(folder, store=tmp_path / "store", device="cpu", parent_bits=4, calibration=None)
    assert "no chat template" in caplog.text
    assert model.prompter.ids([PROMPT]) == model.prompter.raw_ids(PROMPT)
    instructed = pmpd.load(
        folder,
        store=tmp_path / "store",
        device="cpu",
        parent_bits=4,
        calibration=None,
        prompt="Q: {user} A: {assistant}",
    )
    assert instructed.prompter.ids([PROMPT]) == model.prompter.raw_ids(f"Q: {PROMPT} A:")


def test_the_default_store_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "pmpd" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_store() == Path.home() / ".cache" / "pmpd" / "store"


def test_importing_pmpd_imports_nothing_else() -> None:
    code = "import sys, pmpd; print(pmpd.__version__, sorted({'torch', 'pmpd.loading'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == f"{pmpd.__version__} []"
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        pmpd.unload  # noqa: B018


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_is_answered_by_fused_kernels(tmp_path: Path, tiny_llama: Path) -> None:
    fast = pmpd.load(tiny_llama, store=tmp_path, device="cuda", calibration=None, parent_bits=4, low_bits=2)
    slow = pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None, parent_bits=4, low_bits=2)
    assert fast.device.type == "cuda"
    assert "fused kernels" in fast.engine
    assert (fast.bits, slow.bits) == ([2, 3, 4], [2, 3, 4, 16])
    for scheduler in ("high", "static", "low"):
        assert answer(fast, scheduler) == answer(slow, scheduler)
    whole = pmpd.load(tiny_llama, store=tmp_path, calibration=None, parent_bits=4, keep_fp16=True)
    assert answer(whole, "fp16") == answer(slow, "fp16")
