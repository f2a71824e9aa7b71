"""The learned scheduler: features of the seed prompts, training on labels from their rollouts, decisions on a task."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pmpd.artifacts import read_jsonl, write_jsonl, write_tensors
from pmpd.decode import complete, context_limit, prefill
from pmpd.metrics import rouge_l
from pmpd.records import Completion, Generation, Schedule, class_schedules
from pmpd.schedulers import Learned, label, load_network, save_network, train
from pmpd.stages.base import RuntimeConfig, Stage, write_summary
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import by_length, generation, next_prompt, read_rollouts
from pmpd.stages.runtime import load, load_prompter, progress

NETWORK_FILE = "scheduler.safetensors"
COMPLETIONS_FILE = "completions.jsonl"


@dataclass(frozen=True)
class FeaturesConfig:
    """The last block's KV cache after prefill at ``prefill_bits``."""

    prefill_bits: int
    batch_size: int
    runtime: RuntimeConfig


def run_features(config: FeaturesConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write ``<id>.keys`` and ``<id>.values``, ``[kv_heads, length, head_dim]``, a file a batch."""
    samples, prompts = read_samples(inputs["prompts"])
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    batches = by_length(prompts, config.batch_size)
    for k, rows in enumerate(progress(batches, "features", len(batches))):
        part = out / f"batch_{k:05d}.safetensors"
        if part.exists():
            continue
        state = prefill(model, cell, [prompts[i] for i in rows], config.prefill_bits, max_new_tokens=1)
        tensors = {}
        for row, i in enumerate(rows):
            view = state.view(row)
            tensors[f"{samples[i].id}.keys"] = view.keys.contiguous().cpu()
            tensors[f"{samples[i].id}.values"] = view.values.contiguous().cpu()
        write_tensors(part, tensors)
    write_summary(out, {"num_samples": len(samples)})


@dataclass(frozen=True)
class TrainLearnedConfig:
    """Classes, labels and training.

    Attributes:
        max_new_tokens: M at which the labels are made (the paper: 256).
    """

    prefill_bits: int
    levels: list[int]
    max_new_tokens: int
    epochs: int
    learning_rate: float
    weight_decay: float
    dropout: float
    train_batch: int
    holdout: float
    seed: int


def run_train_learned(config: TrainLearnedConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Label the seed prompts by their rollouts and train the network.

    A label is the smallest class whose output's ROUGE-L to the fp16 output is at least uniform high's, else the last.
    """
    samples, _ = read_samples(inputs["prompts"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    tensors: dict[str, Tensor] = {}
    for part in sorted(inputs["features"].glob("batch_*.safetensors")):
        tensors |= load_file(part)
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens)
    fp16, high = table[Schedule.uniform(16)], table[Schedule.uniform(config.levels[0])]

    def agreement(completion: Completion) -> float:
        return rouge_l(completion.generations[0].text, [fp16[completion.sample_id].generations[0].text])

    labels = [
        label([agreement(table[c.canonical(config.max_new_tokens)][s.id]) for c in classes], agreement(high[s.id]))
        for s in samples
    ]
    network, report = train(
        [(tensors[f"{s.id}.keys"], tensors[f"{s.id}.values"]) for s in samples],
        labels,
        len(classes),
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        dropout=config.dropout,
        batch=config.train_batch,
        holdout=config.holdout,
        seed=config.seed,
    )
    save_network(network, out / NETWORK_FILE)
    names = [c.name for c in classes]
    counts = Counter(labels)
    write_summary(
        out,
        {
            "holdout_accuracy": report.holdout_accuracy,
            "majority_accuracy": report.majority_accuracy,
            "num_holdout": report.num_holdout,
            "num_train": report.num_train,
            "num_parameters": report.num_parameters,
        },
        curves={"loss": [{"epoch": i + 1, "loss": v} for i, v in enumerate(report.losses)]},
        tables={
            "labels": [
                {"class": i, "schedule": n, "count": counts[i], "share": counts[i] / len(labels)}
                for i, n in enumerate(names)
            ],
            "confusion": [
                {"label": names[i], **{f"said {n}": row[k] for k, n in enumerate(names)}}
                for i, row in enumerate(report.confusion)
            ],
        },
    )


@dataclass(frozen=True)
class DecideConfig:
    """The trained scheduler on a task's prompts."""

    prefill_bits: int
    levels: list[int]
    max_new_tokens: int
    template: str
    batch_size: int
    runtime: RuntimeConfig


def run_decide(config: DecideConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Write each sample's completion under the learned scheduler.

    A first turn is looked up in the rollouts of the class that was chosen; a later turn depends on the
    answers before it, so it is decoded here, after its own prefill and decision.
    """
    samples, prompts = read_samples(inputs["prompts"])
    table = read_rollouts(inputs["rollouts"])
    classes = class_schedules(config.prefill_bits, config.levels, config.max_new_tokens)
    scheduler = Learned(load_network(inputs["scheduler"] / NETWORK_FILE), config.prefill_bits, classes)
    prompter = load_prompter(inputs["model"], config.template, config.runtime.trust_remote_code)
    model, cell = load(inputs["model"], inputs["nested"], config.runtime)
    room = (context_limit(model) or sys.maxsize) - config.max_new_tokens
    answers: list[list[Generation]] = [[] for _ in samples]
    batches = by_length(prompts, config.batch_size)
    for rows in progress(batches, "decide", len(batches)):
        state = prefill(
            model, cell, [prompts[i] for i in rows], config.prefill_bits, max_new_tokens=config.max_new_tokens
        )
        for row, i in enumerate(rows):
            schedule = scheduler.begin(state.view(row)).schedule
            answers[i].append(table[schedule.canonical(config.max_new_tokens)][samples[i].id].generations[0])
    for turn in range(1, max(len(s.turns) for s in samples)):
        later = [i for i, s in enumerate(samples) if len(s.turns) > turn]
        asked = [next_prompt(prompter, samples[i], answers[i], room) for i in later]
        for rows in by_length(asked, config.batch_size):
            done = complete(
                model,
                cell,
                [asked[k] for k in rows],
                scheduler,
                max_new_tokens=config.max_new_tokens,
                eos_ids=prompter.eos_ids,
            )
            for k, (schedule, ids) in zip(rows, done, strict=True):
                answers[later[k]].append(generation(prompter, schedule, asked[k], ids))
    write_jsonl(
        out / COMPLETIONS_FILE,
        [{"id": s.id, "generations": [g.to_json() for g in a]} for s, a in zip(samples, answers, strict=True)],
    )
    counts = Counter(g.schedule.canonical(config.max_new_tokens).name for a in answers for g in a)
    names = [c.canonical(config.max_new_tokens).name for c in classes]
    write_summary(
        out,
        {"num_samples": len(samples)},
        tables={"choices": [{"class": i, "schedule": n, "count": counts[n]} for i, n in enumerate(names)]},
    )


def read_decisions(path: Path) -> dict[str, Completion]:
    """Completions by sample id."""
    return {
        row["id"]: Completion(row["id"], tuple(Generation.from_json(g) for g in row["generations"]))
        for row in read_jsonl(path / COMPLETIONS_FILE)
    }


FEATURES = Stage("features", 2, FeaturesConfig, run_features, "a prefill of every seed prompt")
TRAIN_LEARNED = Stage("train_learned", 1, TrainLearnedConfig, run_train_learned, "seconds")
DECIDE = Stage("decide", 2, DecideConfig, run_decide, "a prefill of every prompt")
