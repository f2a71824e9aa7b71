"""Reads a ready Hugging Face folder: config, tokenizer, model, and the decoder's shape.

Refuses by name what this library cannot decode. Knows no precisions, and downloads nothing.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pmpd.models.blocks import block_index, block_linears
from pmpd.models.errors import ModelError
from pmpd.models.source import missing_shards, select
from pmpd.records import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # 2 s to import, which a plan does not need

log = logging.getLogger(__name__)

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_NO_LIMIT = 10**9
"""Tokenizers without a length limit store a number above this."""


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: none there, damaged, or not of a decoder-only language model in full precision.
    """
    values = _read_json(folder / "config.json", f"is {folder} the folder of a Hugging Face model?")
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in values:
            raise ModelError(
                f"{folder} brings its own code for model type {kind!r}: read it, then allow it by trust_remote_code "
                "(model.trust_remote_code=true of a run, --trust-remote-code of a chat)"
            )
        raise ModelError(f"{folder}: this transformers knows no model type {kind!r}; a newer one may")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read ({error}): fetch it again") from error
    _check_config(folder, config, values)
    return config


def _check_config(folder: Path, config: PreTrainedConfig, values: dict[str, Any]) -> None:
    if config.is_encoder_decoder:
        raise ModelError(f"{folder} is an encoder-decoder ({config.model_type}): give a decoder-only language model")
    own_code = "AutoModelForCausalLM" in values.get("auto_map", {})
    heads = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ()))
    named = values.get("architectures") or []
    if not own_code and (not heads or (named and not heads & set(named))):
        what = ", ".join(named) or config.model_type
        raise ModelError(f"{folder} is {what}, which is no causal language model: give one that is")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise ModelError(f"{folder} is quantised already ({method}): give the full-precision model")


def _names(entry: str | tuple[str, ...]) -> set[str]:
    return {entry} if isinstance(entry, str) else set(entry)


def context_length(folder: Path, trust_remote_code: bool = False) -> int:
    """Most tokens, prompt and answer together, that the model has positions for.

    Raises:
        ModelError: neither config nor tokenizer says.
    """
    config = read_config(folder, trust_remote_code).get_text_config()
    for field in _CONTEXT_FIELDS:
        if isinstance(value := getattr(config, field, None), int) and value > 0:
            return value
    if (folder / "tokenizer_config.json").is_file():
        value = _read_json(folder / "tokenizer_config.json", "fetch it again").get("model_max_length")
        if isinstance(value, int) and 0 < value < _NO_LIMIT:
            return value
    raise ModelError(f"{folder / 'config.json'} gives no context length: add max_position_embeddings to it")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: none there, damaged, or a package that it needs is missing.
    """
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    found = [n for n in _VOCABULARIES if n in names] + sorted(n for n in names if n.endswith(".tiktoken"))
    if not found:
        raise ModelError(
            f"no tokenizer in {folder} (tokenizer.json or tokenizer.model): copy it from the original model"
        )
    for name in {"tokenizer.json", "tokenizer_config.json"} & names:
        _read_json(folder / name, "fetch it again")
    if found[0] in _SENTENCEPIECE and importlib.util.find_spec("sentencepiece") is None:
        raise ModelError(f"{folder / found[0]} needs a package: pip install sentencepiece protobuf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ModelError(f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error})") from error
    if tokenizer.eos_token_id is None:
        log.warning("the tokenizer in %s has no end-of-sequence token: answers end at max_new_tokens only", folder)
    return tokenizer


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode, without gradients, with transformers' own choice of attention (SDPA where the
    model has it).

    Raises:
        ModelError: weights that are missing or damaged, or a model that cannot be decoded here.
    """
    config = read_config(folder, trust_remote_code)
    files = weight_files(folder)
    for file in files:
        open_safetensors(file)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded ({type(error).__name__}: {error})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors, the first {missing[0]}, and they would be random: fetch it again"
        )
    model.requires_grad_(False)
    return model.to(device).eval()


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    config = read_config(folder, trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be built from its config.json ({type(error).__name__}: {error})") from error


def architecture(folder: Path, trust_remote_code: bool = False) -> Architecture:
    """The decoder's shape, from the config alone.

    Raises:
        ModelError: blocks that differ from each other, or layers that cannot be quantised.
    """
    model = empty_model(folder, trust_remote_code)
    config = model.config.get_text_config()
    blocks: dict[int, list[tuple[int, int]]] = {}
    for name, linear in block_linears(model).items():
        blocks.setdefault(block_index(name), []).append((linear.out_features, linear.in_features))
    shapes = blocks[0]
    if differing := [i for i, own in blocks.items() if own != shapes]:
        raise ModelError(f"{folder}: block {differing[0]} has other shapes than block 0, and one shape stands for all")
    num_heads = config.num_attention_heads
    return Architecture(
        num_layers=len(blocks),
        hidden_size=config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        linear_shapes=tuple(shapes),
        vocab_size=model.get_output_embeddings().weight.shape[0],
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        ModelError: none, or a shard is missing.
    """
    names = select(file.name for file in folder.iterdir())
    files = [folder / name for name in names if name.endswith(".safetensors")]
    if not files:
        raise ModelError(f"no model*.safetensors in {folder}")
    if missing := missing_shards(names, folder):
        raise ModelError(f"{folder} lacks {', '.join(missing)}: copy or download the whole model")
    return files


def open_safetensors(file: Path) -> Any:
    """A handle that reads single tensors.

    Raises:
        ModelError: the file is damaged; its header says how long it must be.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error}): fetch it again") from error


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"no {file.name} in {file.parent}: {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} is damaged (no JSON object): fetch it again")
    return values
