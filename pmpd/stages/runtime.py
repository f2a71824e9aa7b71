"""Loading a model for a stage: one place that turns input directories into something that decodes.

Knows folders, dtypes and devices; does not know what the stage is about to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from pmpd.models import Prompter, attach, load_model, load_tokenizer
from pmpd.quant import PrecisionCell
from pmpd.stages.base import RuntimeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # 2 s to import, which a plan does not need

T = TypeVar("T")


def load(model: Path, nested: Path | None, runtime: RuntimeConfig) -> tuple[PreTrainedModel, PrecisionCell | None]:
    """The model in ``model``, its block linears replaced by the nested ones of ``nested`` where given."""
    loaded = load_model(model, runtime.torch_dtype, runtime.device, runtime.trust_remote_code)
    return loaded, attach(loaded, nested) if nested is not None else None


def load_prompter(model: Path, template: str, trust_remote_code: bool) -> Prompter:
    """Prompts for the model in ``model``, which end where its tokenizer or its generation config says."""
    has_config = (model / GENERATION_CONFIG_NAME).exists()
    generation = GenerationConfig.from_pretrained(model) if has_config else None
    return Prompter(load_tokenizer(model, trust_remote_code), template, generation)


def progress(items: Iterable[T] | None, description: str, total: int | None = None) -> tqdm[T]:
    """A progress bar on a terminal; silent in a log file. Without ``items`` the caller says ``update()`` after each."""
    return tqdm(items, desc=description, total=total, disable=None, dynamic_ncols=True, leave=False)
