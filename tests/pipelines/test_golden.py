"""One fingerprint a stage, pinned beside its version: change what a stage means without raising it, and this fails.

Fingerprints hold integers or rounded values, so that they are the same on other CPUs. When a change is meant, raise
``version`` where the stage is declared and put the printed fingerprint here.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from pipelines.grid import CONF
from pipelines.plan import Planner
from pipelines.run import run_cell
from pipelines.schema import register
from pmpd.artifacts import Node, Store, read_json, read_jsonl
from pmpd.config import from_omegaconf
from pmpd.quant import NestedWeight
from pmpd.stages import STAGES, read_summary
from tests.pipelines.cells import tiny
from tests.tiny import tiny_model_dir

GOLDEN: dict[str, tuple[int, str]] = {
    "decide": (3, "220c4343fc927d2d"),
    "estimate": (2, "259b34e24a751a4f"),
    "evaluate": (2, "3dc69a079ce4e098"),
    "features": (3, "feffd311c0520328"),
    "fit_static": (1, "2e9476430a3c7874"),
    "labels": (1, "a55a9d61a30ad990"),
    "oracle": (1, "cfbefd93b421b130"),
    "prompts": (1, "e876010f46db576b"),
    "quantize": (1, "a8393d53ee53b8bb"),
    "rollouts": (2, "db5823ad716863cc"),
    "search": (3, "5cd29ab5f6d613f6"),
    "seeds": (1, "bf373a6d498b74ed"),
    "sensitivity": (1, "7d4b279af76ebcc2"),
    "texts": (1, "e4f8f362d6e4fc2b"),
    "train_learned": (2, "c2272c0a862f11de"),
}

NOT_PINNED = {
    "weights": "needs a model of another format; tests/models/test_convert.py compares it with the original",
    "data": "needs the hub; tests/tasks/test_hub.py compares it with a stand-in",
    "moments": "only quantizer=joint has it; tests/quant/test_moments.py compares it with a plain sum",
    "quantize_joint": "only quantizer=joint has it; tests/quant/test_joint.py holds its definitions",
    "refit_tables": "only quantizer=anyprec quantizer.refits has it; tests/quant/test_refit.py holds its definition",
    "tune_tables": "only quantizer.tuning_steps has it; tests/quant/test_tuning.py holds its definitions",
    "dense_sparse": "only scheduler=dense_sparse has it; tests/quant/test_dense_sparse.py holds its definitions",
    "hyperparameters": "only pipelines/tune.py has it; tests/pipelines/test_tune.py reads it",
    "latency": "its output is a time",
    "linears": "its output is a time",
    "gain": "it reads times; tests/stages/test_measure.py works one out by hand",
}


def significant(values: Any, digits: int = 2) -> list[float]:
    return [float(f"{v:.{digits - 1}e}") for v in np.ravel(values)]


def fingerprint(node: Node, path: Path) -> Any:
    summary = read_summary(path)
    match node.stage:
        case "prompts" | "seeds":
            return [row["prompt_ids"] for row in read_jsonl(path / "samples.jsonl")]
        case "texts":
            return load_file(path / "windows.safetensors")["windows"].tolist()
        case "sensitivity":
            return {
                k: significant(v.float().mean()) for k, v in sorted(load_file(path / "block_000.safetensors").items())
            }
        case "quantize":
            tensors = load_file(path / "block_001.safetensors")
            names = sorted(k.removesuffix(".planes") for k in tensors if k.endswith(".planes"))
            weights = [NestedWeight.from_tensors(tensors, n) for n in names]
            return [significant(w.dequantize(b, torch.float64).square().mean(), 3) for w in weights for b in (2, 3, 8)]
        case "search":
            curves = summary["curves"]
            rows = [row for name in ("perplexity", "pairs") for row in curves[name]]
            return [[sorted(row), significant(row["perplexity"], 3)] for row in rows]  # two windows: no power to pin
        case "rollouts":
            rows = read_jsonl(path / "batch_00000.jsonl")
            return [[g["schedule"], g["token_ids"]] for row in rows for g in row["generations"]]
        case "fit_static":
            return [read_json(path / "choice.json"), [r["lossless"] for r in summary["curves"]["switch_step"]]]
        case "features":
            tensors = load_file(path / "batch_00000.safetensors")
            return {k: [*v.shape, *significant(v.float().abs().mean())] for k, v in sorted(tensors.items())}
        case "train_learned":
            return significant(summary["curves"]["loss"][-1]["loss"], 1)
        case "labels":
            return [[row["label"], significant(row["quality"])] for row in read_jsonl(path / "labels.jsonl")]
        case "decide" | "oracle":
            return [[g["token_ids"] for g in row["generations"]] for row in read_jsonl(path / "completions.jsonl")]
        case "evaluate" | "estimate":
            numbers = ("value", "ci_low", "ci_high")
            return {
                r["quantity"]: [r["n"], *(significant(r[k]) for k in numbers if r[k] is not None)]
                for r in read_json(path / "results.json")
            }
    raise AssertionError(f"no fingerprint for stage {node.stage}")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    """Fingerprints of every stage on a tiny model whose weights come from numpy, not from a library's initialiser."""
    folder = tmp_path_factory.mktemp("golden")
    model = tiny_model_dir(folder, "llama_gqa")
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.15, tensor.shape)
            tensors[name] = torch.from_numpy(values).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})
    prints: dict[str, set[str]] = {}
    register()
    for scheduler in ("static", "learned", "oracle"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            lines = [
                *tiny(model),
                "tracking=disabled",
                f"scheduler={scheduler}",
                f"store={folder / 'store'}",
            ]
            config = from_omegaconf(compose("config", overrides=lines))
        run_cell(config, folder / scheduler)
        store = Store(folder / "store")
        for target in Planner(config, store).cell().targets:
            for node in target.ancestors():
                if node.stage not in NOT_PINNED:
                    text = json.dumps(fingerprint(node, store.path(node)), sort_keys=True)
                    prints.setdefault(node.stage, set()).add(text)
    return {
        stage: hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16] for stage, texts in prints.items()
    }


def test_every_stage_is_pinned_or_excused():
    assert set(GOLDEN) | set(NOT_PINNED) == set(STAGES)


@pytest.mark.parametrize("stage", sorted(GOLDEN))
def test_meaning_and_version_go_together(stage, found):
    assert (STAGES[stage].version, found[stage]) == GOLDEN[stage], f"new fingerprint: {found[stage]}"
