"""The first stages: hub weights and data brought into the store, and texts turned into prompts and windows.

They cost seconds and run before anything expensive, so that bad data is refused while nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from pmpd.artifacts import Input, Root, read_jsonl, write_jsonl, write_tensors
from pmpd.models import (
    ModelSource,
    context_length,
    digest,
    folder,
    load_tokenizer,
    materialize,
    needs_conversion,
    resolve,
)
from pmpd.records import Sample
from pmpd.stages.base import Stage, write_summary
from pmpd.stages.runtime import load_prompter, progress
from pmpd.tasks import build, download, read_rows, role_rows, seed_prompts, windows

SAMPLES_FILE = "samples.jsonl"
WINDOWS_FILE = "windows.safetensors"
ROWS_FILE = "rows.jsonl"
PLAIN = "{user}{assistant}"
"""The template of a model without a convention: seed prompts are plain text."""


@dataclass(frozen=True)
class WeightsConfig:
    """Nothing changes the conversion but its input."""


def run_weights(config: WeightsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write a Hugging Face folder with safetensors from a GGUF file or a folder of ``.bin`` weights."""
    materialize(resolve(str(inputs["source"]), None), out)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    write_summary(out, {"weights_gib": size / 2**30})


@dataclass(frozen=True)
class DataConfig:
    """A data set on the hub at one commit."""

    hub_path: str
    hub_config: str | None
    commit: str
    split: str
    max_rows: int | None


def run_data(config: DataConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write a hub data set's rows as JSON lines."""
    num_rows = download(
        config.hub_path, config.hub_config, config.commit, config.split, config.max_rows, out / ROWS_FILE
    )
    write_summary(out, {"num_rows": num_rows})


@dataclass(frozen=True)
class PromptsConfig:
    """A task's split as prompts of one model."""

    dataset: str
    split: str
    instruction: str
    template: str
    limit: int | None
    min_reference_words: int
    max_new_tokens: int
    truncate: bool
    trust_remote_code: bool


def run_prompts(config: PromptsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write the samples of a split, each with the token ids of its first turn.

    Raises:
        ValueError: a prompt that does not fit the model's context, by sample id.
    """
    task = build(config.dataset)
    rows = read_rows(data_file(inputs["data"]), task.columns)
    samples = task.samples(
        rows,
        prompt=config.instruction,
        limit=config.limit,
        min_reference_words=config.min_reference_words,
        split=config.split,
    )
    prompter = load_prompter(inputs["model"], config.template, config.trust_remote_code)
    room = context_length(inputs["model"], config.trust_remote_code) - config.max_new_tokens
    records, num_shortened = [], 0
    for sample in progress(samples, "prompts"):
        turns = list(sample.turns)
        ids = prompter.ids(turns[:1], [])
        shortened = len(ids) > room
        if shortened:
            if not (config.truncate and sample.document):
                raise ValueError(
                    f"the prompt of sample {sample.id} has {len(ids)} tokens; with max_new_tokens="
                    f"{config.max_new_tokens} the model's context leaves {room}. task.overlong=truncate cuts the "
                    "document's end (counted in the table); a smaller task.max_new_tokens leaves more room"
                )
            turns = list(prompter.shorten(turns, sample.document, room))
            ids = prompter.ids(turns[:1], [])
            num_shortened += 1
        record = sample_to_json(sample)
        records.append({**record, "turns": turns, "prompt_ids": ids, "shortened": shortened})
    write_jsonl(out / SAMPLES_FILE, records)
    write_summary(out, _prompt_lengths(records) | {"num_shortened": num_shortened})


@dataclass(frozen=True)
class TextsConfig:
    """Windows of plain text for one role (``calibration`` or ``perplexity``), no longer than the model's context."""

    role: str
    count: int
    window_tokens: int
    trust_remote_code: bool


def run_texts(config: TextsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write ``windows`` int64 ``[count, window_tokens]``."""
    texts = role_rows(read_rows(data_file(inputs["data"]), ("text",)), config.role)
    tokenizer = load_tokenizer(inputs["model"], config.trust_remote_code)
    context = context_length(inputs["model"], config.trust_remote_code)
    cut = windows(
        texts,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        config.count,
        min(config.window_tokens, context),
        role=config.role,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    write_tensors(out / WINDOWS_FILE, {"windows": cut})
    write_summary(out, {"num_windows": cut.shape[0], "window_tokens": cut.shape[1], "num_texts": len(texts)})


@dataclass(frozen=True)
class SeedsConfig:
    """Plain texts cut at a random length: the prompts that the learned scheduler is trained on."""

    count: int
    max_tokens: int
    max_new_tokens: int
    seed: int
    trust_remote_code: bool


def run_seeds(config: SeedsConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write the seed prompts as samples without references (the paper cuts 256 C4 texts, at 32 tokens or more)."""
    texts = role_rows(read_rows(data_file(inputs["data"]), ("text",)), "seeds")
    prompter = load_prompter(inputs["model"], PLAIN, config.trust_remote_code)
    room = context_length(inputs["model"], config.trust_remote_code) - config.max_new_tokens
    prompts = seed_prompts(
        texts, prompter.raw_ids, config.count, max_tokens=min(config.max_tokens, room), seed=config.seed
    )
    records = [
        {
            **sample_to_json(Sample(id=f"seed_{i}", turns=(prompter.text(ids),), raw=True)),
            "prompt_ids": ids,
            "shortened": False,
        }
        for i, ids in enumerate(prompts)
    ]
    write_jsonl(out / SAMPLES_FILE, records)
    write_summary(out, _prompt_lengths(records))


def data_file(path: Path) -> Path:
    """The JSON lines behind a data input: a file of the user's, or the ``data`` stage's."""
    return path / ROWS_FILE if path.is_dir() else path


def sample_to_json(sample: Sample) -> dict[str, object]:
    return {
        "id": sample.id,
        "turns": list(sample.turns),
        "references": list(sample.references),
        "category": sample.category,
        "raw": sample.raw,
    }


def read_samples(path: Path) -> tuple[list[Sample], list[list[int]]]:
    """Samples of a ``prompts`` or ``seeds`` artifact and the token ids of their first turns."""
    rows = read_jsonl(path / SAMPLES_FILE)
    samples = [
        Sample(r["id"], tuple(r["turns"]), tuple(r["references"]), category=r["category"], raw=r["raw"]) for r in rows
    ]
    return samples, [r["prompt_ids"] for r in rows]


def read_windows(path: Path) -> torch.Tensor:
    """The ``[count, tokens]`` windows of a ``texts`` artifact."""
    return load_file(path / WINDOWS_FILE)["windows"]


def _prompt_lengths(records: list[dict[str, object]]) -> dict[str, float | int | str | None]:
    lengths = [len(r["prompt_ids"]) for r in records]  # type: ignore[arg-type]
    return {
        "num_samples": len(lengths),
        "mean_prompt_tokens": sum(lengths) / len(lengths),
        "max_prompt_tokens": max(lengths),
    }


WEIGHTS = Stage("weights", 1, WeightsConfig, run_weights, "seconds to minutes, once a model")
DATA = Stage("data", 1, DataConfig, run_data, "a download")
PROMPTS = Stage("prompts", 1, PromptsConfig, run_prompts, "seconds")
TEXTS = Stage("texts", 1, TextsConfig, run_texts, "seconds")
SEEDS = Stage("seeds", 1, SeedsConfig, run_seeds, "seconds")


def model_input(source: ModelSource, digests: Path) -> Input:
    """The model's folder, or the stage that makes one of safetensors from a GGUF file or ``.bin`` weights."""
    key = digest(source, digests)
    if source.kind == "gguf":
        return WEIGHTS.node(WeightsConfig(), source=Root(source.path, key, partial(Path, source.files[0])))
    ready = Root(source.path, key, partial(folder, source))
    return WEIGHTS.node(WeightsConfig(), source=ready) if needs_conversion(source) else ready
