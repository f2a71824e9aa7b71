"""Writes a model as a Hugging Face folder of safetensors when it comes as GGUF or as PyTorch pickles.

Done once a model; the folder is then read like any other. Pickles are read with ``weights_only``: one that wants to
run code is refused.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmpd.models.errors import ModelError
from pmpd.models.source import ModelSource, folder, is_weight

log = logging.getLogger(__name__)

GGUF_DTYPE = torch.float16
"""GGUF scales are float16 and a weight is one times a small integer, plus an offset: rounding the product to float16
moved SmolLM2-135M's perplexity by 3e-5 of itself (WikiText-2, 8 x 512 tokens) and no greedy token, at half the size."""


def materialize(source: ModelSource, out_dir: Path) -> None:
    """Write config, tokenizer and safetensors into ``out_dir``, which is made.

    Raises:
        ModelError: a file that is damaged, or a pickle that wants to run code.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if source.kind == "gguf":
        _convert_gguf(source.files[0], out_dir)
        return
    root = folder(source)
    names = [file.name for file in source.files]
    for name in names:
        if not is_weight(name) and name != "pytorch_model.bin.index.json":
            shutil.copyfile(root / name, out_dir / name)
    _convert_pickles([root / name for name in names if is_weight(name)], out_dir)


def _convert_gguf(file: Path, out_dir: Path) -> None:
    log.info("dequantising %s: the result is a model of that file's precision, stored as float16", file.name)
    # Versions without this class always dequantised.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=GGUF_DTYPE, **options)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{file} cannot be read as a language model ({type(error).__name__}: {error}): "
            "fetch it again, or give the folder of the original model"
        ) from error
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)


def _convert_pickles(files: list[Path], out_dir: Path) -> None:
    """One safetensors shard a pickle, one in memory at a time."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    shards = tqdm(files, desc="weights", unit="shard", disable=None, leave=False)
    for number, file in enumerate(shards, start=1):
        tensors = _own_memory(_load_pickle(file))
        shard = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, out_dir / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} is refused: it is damaged or holds more than tensors, and reading it could run code. "
            "Use the model's safetensors, or convert it where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({type(error).__name__}): fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{file} is not a model's state: expected tensors by name")
    return state


def _own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none sharing memory: safetensors refuses tied tensors and views, pickles are full of them."""
    seen: set[int] = set()
    own = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        own[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return own
