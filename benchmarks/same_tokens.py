"""A GPU's tokens beside those of the CPU reference: one nested model, greedy, several schedules.

    python benchmarks/same_tokens.py                     SmolLM2, 6 shipped prompts, up to 96 tokens
    python benchmarks/same_tokens.py --model DIR --device cpu --dtype bfloat16      another model; needs no GPU

The reference is float32 on the CPU, dequantised, of the GPU's own nested model. (One that a CPU makes is another: the
gradients that weight its errors are bfloat16 on a GPU.) Writes benchmarks/results/same_tokens.csv, a row a prompt and
schedule: how many tokens are equal from the first on, and, where they part, the two tokens and what the reference's
logits say of them. Rounding explains a small gap between the two; nothing explains a large one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from decode import commit_here
from products import write_rows
from quantiser_bench import NEWS, texts_of
from tqdm import tqdm

import pmpd
from pmpd.decode import decode, prefill
from pmpd.records import FP16_BITS, Schedule
from pmpd.schedulers import Planned
from pmpd.tasks import build

RESULTS = Path(__file__).parent / "results" / "same_tokens.csv"


@dataclass(frozen=True)
class Compared:
    """One prompt under one schedule.

    Attributes:
        tokens: of the reference's answer, its end-of-sequence token included.
        equal: how many of them, from the first on, the other one has too.
        token, other_token: what they say where they part.
        logit, other_logit: the reference's, of these two.
    """

    prompt: int
    schedule: str
    tokens: int
    equal: int
    token: int | None = None
    other_token: int | None = None
    logit: float | None = None
    other_logit: float | None = None


def answer(model: pmpd.Model, ids: list[int], schedule: Schedule, limit: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens up to the end of the sequence, and the logits that each was taken from, on the CPU."""
    state = prefill(model.model, model.cell, [ids], schedule.prefill_bits, max_new_tokens=limit)
    tokens, logits = [], []
    for step in decode(model.model, model.cell, state, Planned(schedule), max_new_tokens=limit, eos_ids=()):
        tokens.append(int(step.tokens))
        logits.append(state.logits[0].float().cpu())
        if tokens[-1] in model.prompter.eos_ids:
            break
    return tokens, logits


def compare(
    reference: pmpd.Model, other: pmpd.Model, prompts: Sequence[list[int]], schedules: Sequence[Schedule], limit: int
) -> list[Compared]:
    found = []
    pairs = [(k, ids, schedule) for k, ids in enumerate(prompts) for schedule in schedules]
    for k, ids, schedule in tqdm(pairs, unit="answer", disable=None):
        (wanted, logits), (said, _) = (answer(model, ids, schedule, limit) for model in (reference, other))
        equal = next((i for i, (a, b) in enumerate(zip(wanted, said, strict=False)) if a != b), len(wanted))
        row = Compared(k, schedule.name, len(wanted), equal)
        if equal < len(wanted):
            a, b = wanted[equal], said[equal]
            row = Compared(k, schedule.name, len(wanted), equal, a, b, float(logits[equal][a]), float(logits[equal][b]))
        found.append(row)
    return found


def summary(rows: Sequence[Compared]) -> str:
    parted = [row for row in rows if row.equal < row.tokens]
    lines = [f"{len(rows) - len(parted)} of {len(rows)} answers equal, {sum(row.equal for row in rows)} tokens"]
    for row in parted:
        assert row.logit is not None
        assert row.other_logit is not None
        gap = row.logit - row.other_logit
        lines.append(
            f"prompt {row.prompt}, {row.schedule}: part at token {row.equal}, the reference's logits "
            f"{row.logit:.3f} and {row.other_logit:.3f}, {gap:.3f} apart"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--nested", help="folder of its nested model; default: found or made, as pmpd.load does")
    parser.add_argument("--store", help="folder that keeps nested models; default: in the user's cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit_here(), help="what to record, where there is no repository")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    try:
        other = pmpd.load(
            args.model, nested=args.nested, store=args.store, device=args.device, dtype=dtype, keep_fp16=True
        )
        reference = pmpd.load(args.model, nested=other.nested, store=args.store, device="cpu")
    except ValueError as error:
        parser.error(str(error))
    high, low = reference.high_bits, reference.low_bits
    schedules = [
        *(Schedule.uniform(bits) for bits in (FP16_BITS, high, low)),
        Schedule(high, (high, low), (args.tokens // 3,)),
    ]
    task = build("cnn_dailymail")
    news = texts_of("samples", "cnn_dailymail", "test", task.columns)
    samples = task.samples(news, prompt=NEWS, limit=args.prompts, min_reference_words=0, split="test")
    prompts = [reference.prompter.ids(list(sample.turns), []) for sample in samples]
    rows = compare(reference, other, prompts, schedules, args.tokens)
    print(summary(rows))
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    run = {"device": where, "dtype": args.dtype, "versions": f"torch {torch.__version__}", "commit": args.commit}
    write_rows(args.out, [f.name for f in fields(Compared)] + list(run), (asdict(row) | run for row in rows))


if __name__ == "__main__":
    main()
