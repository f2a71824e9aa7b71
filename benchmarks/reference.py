"""The reference code's own functions beside ours on the same inputs. Bring a checkout: none of it is here.

    git clone https://github.com/SamsungLabs/PMPD PMPD          (its licence is not commercial; nothing of it is here)
    git clone https://github.com/SNU-ARC/any-precision-llm ANY
    python benchmarks/reference.py --pmpd PMPD --any-precision ANY
    python benchmarks/reference.py --pmpd PMPD --out docs/results/reference.md

Each row says what was compared, what they give, what we give, and whether the two must be equal (``equal``, checked) or
differ on purpose (``departure``; README's fidelity section says why). A row that must be equal and is not ends the
script with exit code 1. Packages of theirs that are not installed (evaluate, hyperopt, any_precision) are
replaced by stand-ins as far as these functions reach: ROUGE by rouge-score with its bootstrap aggregator, which is
what evaluate calls. Random inputs, seed 0, on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import json
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_code import EVALUATE, load, load_schedulers, module, stand_ins
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pmpd.decode import decode_schedules
from pmpd.decode.cache import with_cache
from pmpd.metrics import rouge_l
from pmpd.quant import quantize_weight
from pmpd.records import Prefill, Schedule, average_bits, switch_grid
from pmpd.report import markdown_table
from pmpd.schedulers import LearnedNetwork, Setting, build, label
from pmpd.tasks import build as build_task
from pmpd.tasks import locate, read_rows

M = 256
Row = tuple[str, str, str, str]


def their_bits(scheduler: Any, num_steps: int, logits: Sequence[Tensor] | None = None) -> list[int]:
    """Bits of their loop's decode steps: the first is high, each later one is asked for after the step before it."""
    scheduler.reset()
    bits = [max(scheduler.precisions)]
    for index in range(1, num_steps):
        seen = None if logits is None else logits[index]
        bits.append(scheduler.schedule(index=index, precision=bits[-1], logits=seen))
    return bits


def steps(schedulers: dict[str, Any]) -> Iterator[Row]:
    naive = schedulers["naive_scheduler"].NaiveScheduler
    for s in (0, 1, 2):
        theirs = their_bits(naive([4, 3], s), 6)
        ours = Schedule(4, (4, 3), (s,)).bits_of(7)
        kind = "equal" if s else "departure: their first step is always high"
        yield f"bits of the first six decode steps, switch step {s}", str(theirs), str(ours), kind


def confidence(schedulers: dict[str, Any]) -> Iterator[Row]:
    theirs = schedulers["confidence_scheduler"].ConfidenceScheduler([4, 3])
    generator = torch.Generator().manual_seed(0)
    equal = in_use = 0
    for _ in range(100):
        # Sharper as the text goes on, as a model is.
        logits = [torch.randn(1, 1, 50, generator=generator) * (1 + t / 8) for t in range(40)]
        found = sum(b == 4 for b in their_bits(theirs, 40, logits))
        policies = [build("confidence", Setting(4, (4, 3), (), 0), {}).begin(Prefill(*logits[:3], M)) for _ in range(2)]
        # They look from the first decode step's logits on; fed the same, ours must switch at the same step.
        fed = 1 + sum(policies[0].bits(t, logits[t][:, -1]) == 4 for t in range(1, 40))
        own = sum(policies[1].bits(t, logits[t - 1][:, -1]) == 4 for t in range(1, 41))
        equal += fed == found
        in_use += own == found
    yield "confidence: same switch on the same 39 logits, of 100 sequences", "100", str(equal), "equal"
    yield (
        "confidence: same switch in use",
        "100",
        str(in_use),
        "departure: ours looks at token 1's confidence too, which prefill yields",
    )


def classifier(schedulers: dict[str, Any]) -> Iterator[Row]:
    make = schedulers["kv_cache_scheduler"].KVCacheClassifier
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints at every forward
        theirs = make(128, 32).eval()
        count = sum(p.numel() for p in theirs.parameters())
        small = make(16, 4).eval()
        keys, values = (torch.randn(1, 4, 9, 16) for _ in range(2))  # it takes one sequence only
        with torch.no_grad():
            said = small(keys, values).double()
    w = {name: p.detach().double() for name, p in small.named_parameters()}
    # As docs describe it: heads averaged, a query for every head attends, mean, norm, two layers, softmax.
    k, v = keys.double().mean(1), values.double().mean(1)
    weights = torch.einsum("hqd,btd->bhqt", w["query"], k).div(4).softmax(-1)
    x = torch.einsum("bhqt,btd->bhqd", weights, v).mean(2).transpose(1, 2).flatten(1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x * w["ln.weight"] + w["ln.bias"]
    hidden = (x @ w["project.0.weight"].T + w["project.0.bias"]).relu()
    expected = (hidden @ w["project.2.weight"].T + w["project.2.bias"]).softmax(-1)
    same = bool((said - expected).abs().max() < 1e-5)
    yield "classifier: output for given weights is that of its description", "True", str(same), "equal"
    own = LearnedNetwork(32, 128, 4).num_parameters
    yield (
        "classifier: parameters for Vicuna-7B",
        f"{count:,}",
        f"{own:,}",
        "departure: a query a head over its own keys, hidden width 32, logits without a softmax",
    )


class Precisions(nn.Module):
    """A tiny random Llama whose weights are rounded for each precision, called as either side calls its model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=120,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
        whole: Any = LlamaForCausalLM(config).double().eval().requires_grad_(False)
        self.config, self.bits, self.levels = config, 16, nn.ModuleDict({"16": whole})
        for bits in (5, 4):
            rounded = copy.deepcopy(whole)
            for name, parameter in rounded.named_parameters():
                if "layers" in name and parameter.dim() == 2:
                    step = parameter.abs().max() / 2 ** (bits - 1)
                    parameter.copy_((parameter / step).round() * step)
            self.levels[str(bits)] = rounded

    def forward(self, past_key_values: Any = None, **inputs: Any) -> Any:
        inner: Any = self.levels[str(self.bits)]
        return inner(**inputs, **with_cache(inner, past_key_values))

    class Theirs:
        """``model.model(ids, precision=, past_key_values=, use_cache=)``, caches as tuples."""

        def __init__(self, own: Precisions) -> None:
            self.own = own
            self.model = self
            self.tokenizer = types.SimpleNamespace(eos_token_id=-1, decode=words)

        def __call__(self, ids: Tensor, precision: int, past_key_values: Any, use_cache: bool) -> dict[str, Any]:
            cache = DynamicCache(past_key_values or None)
            self.own.bits = precision
            logits = self.own(input_ids=ids, past_key_values=cache, use_cache=True).logits
            return {"logits": logits, "past_key_values": tuple((layer.keys, layer.values) for layer in cache.layers)}


def words(ids: Tensor | Sequence[int], skip_special_tokens: bool = True) -> str:
    return " ".join(f"w{int(i)}" for i in ids)


def decoded(model: Any, asked: Sequence[Tensor], schedules: Sequence[Schedule]) -> dict[Schedule, list[list[int]]]:
    prompts = [p.tolist() for p in asked]
    return decode_schedules(model, model, prompts, schedules, max_new_tokens=M, eos_ids=())


def labels(folder: Path, prompts: int = 12) -> Iterator[Row]:
    empty = module()
    names = ["any_precision", "any_precision.modules", "any_precision.modules.AnyPrecisionLinear", "hyperopt", "pmpd"]
    fakes: dict[str, Any] = dict.fromkeys(names, empty) | {"evaluate": EVALUATE}
    fakes["any_precision.modules.AnyPrecisionLinear"] = module(AnyPrecisionLinear=nn.Linear)
    fakes["hyperopt"] = module(STATUS_OK="ok")
    fakes["pmpd"] = module(Scheduler=object)
    if importlib.util.find_spec("sklearn") is None:
        fakes |= {"sklearn": empty, "sklearn.metrics": module(precision_recall_curve=None)}
    with stand_ins(**fakes):
        train = load(folder / "pmpd" / "train" / "train_scheduler.py", "reference_train")
    clone = train.clone_past_key_values
    train.clone_past_key_values = lambda cache, device="cpu": clone(cache, "cpu")
    model = Precisions()
    generator = torch.Generator().manual_seed(0)
    asked = [torch.randint(120, (int(n),), generator=generator) for n in torch.randint(8, 40, (prompts,))]
    outputs = [words(ids) for ids in decoded(model, asked, [Schedule.uniform(16)])[Schedule.uniform(16)]]
    data = [{"input_ids": p[None], "fp16_output": text} for p, text in zip(asked, outputs, strict=True)]
    on_gpu, clear = Tensor.cuda, torch.cuda.empty_cache
    try:
        Tensor.cuda = Tensor.cpu  # type: ignore[assignment,method-assign]  # their loop asks for a GPU
        torch.cuda.empty_cache = lambda: None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = train.SupervisedDataset(data, Precisions.Theirs(model), [(5, 4)]).label_dict[5, 4]
    finally:
        Tensor.cuda, torch.cuda.empty_cache = on_gpu, clear  # type: ignore[method-assign]

    def ours(switch_steps: Sequence[int], digits: int | None) -> list[int]:
        schedules = [*(Schedule(5, (5, 4), (s,)) for s in switch_steps), Schedule.uniform(5)]
        done = decoded(model, asked, schedules)
        found = []
        for i, reference in enumerate(outputs):
            quality = [rouge_l(words(done[s][i]), [reference]) for s in schedules]
            quality = quality if digits is None else [round(q, digits) for q in quality]
            found.append(label(quality, quality[-1]))
        return found

    matched = ours([1, 86, 171], 3)
    yield f"labels of {prompts} prompts, their steps (counted our way) and rounding", str(theirs), str(matched), "equal"
    own = ours(switch_grid(M)[:-1], None)
    same = sum(a == b for a, b in zip(own, theirs, strict=True))
    yield (
        f"labels of {prompts} prompts by our definition: how many are theirs",
        str(prompts),
        str(same),
        "departure: switch step 0 is all low, ROUGE-L unrounded (and stemmed, which does not show here)",
    )


def scores(folder: Path, schedulers: dict[str, Any]) -> Iterator[Row]:
    with stand_ins(evaluate=EVALUATE):
        get_score = load(folder / "pmpd" / "eval" / "get_score.py", "reference_score")
    file = locate("dialogsum", "validation", "samples")
    assert file is not None
    task = build_task("dialogsum")
    samples = task.samples(
        read_rows(file, task.columns), prompt="{document}", limit=None, min_reference_words=0, split="validation"
    )
    references = [s.references[0] for s in samples]
    predictions = [*references[1:], references[0]]
    naive = schedulers["naive_scheduler"].NaiveScheduler([4, 3], 85)
    logged = their_bits(naive, M + 1)[1:]  # N + 1 steps for N tokens, the first not logged
    log = {str(b): logged.count(b) for b in set(logged)}
    lines = [{"choices": [{"turns": [text], "precision_log": [log], "new_tokens": [M + 1]}]} for text in predictions]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        path = Path(scratch) / "answers.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines))
        np.random.seed(0)
        found, _, bits = get_score.get_scores([str(path)], "dsum", references)
    theirs = 100 * found[str(path)]["rougeL"]
    ours = 100 * float(np.mean([rouge_l(p, [r]) for p, r in zip(predictions, references, strict=True)]))
    yield (
        f"ROUGE-L of {len(predictions)} texts",
        f"{theirs:.4f}",
        f"{ours:.4f}",
        "departure: the median of 1000 bootstrap means there, the mean here",
    )
    own = average_bits(Schedule(4, (4, 3), (85,)).bits_of(M))
    yield (
        f"average bits, switch step 85 of {M} tokens",
        f"{bits[str(path)]:.4f}",
        f"{own:.4f}",
        "departure: their first step is left out, and one more than asked for is made",
    )


def quantiser(folder: Path) -> Iterator[Row]:
    theirs = load(folder / "any_precision" / "quantization" / "quantize.py", "reference_quantize")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1024, generator=generator) * torch.rand(64, 1024, generator=generator).exp()
    sensitivity = torch.rand(64, 1024, generator=generator) ** 4
    tables, codes = theirs._seed_and_upscale_layer([sensitivity.numpy()], [weight.numpy()], 2, 8, 1, 0)
    nested = {solver: quantize_weight(weight, sensitivity, solver=solver) for solver in ("exact", "lloyd")}

    def errors(values: Tensor) -> Tensor:
        return (sensitivity.double() * (weight.double() - values.double()).square()).sum(1)

    index = torch.from_numpy(codes[0]).long().flatten(1)
    for k, bits in enumerate(range(2, 9)):
        table = torch.from_numpy(tables[0][k]).half().double()[:, 0]
        base = errors(table.gather(1, index >> (8 - bits)))
        ratios = {s: errors(n.dequantize(bits, torch.float64)) / base for s, n in nested.items()}
        shown = "; ".join(f"{s} {float(r.mean()):.4f} ({float(r.max()):.4f})" for s, r in ratios.items())
        same = float((ratios["lloyd"] - 1).abs().max()) < 1e-3
        yield (
            f"error of a row at {bits} bits over theirs, mean (worst) of 64 rows",
            "1",
            shown,
            f"departure: exact search; by their search {'equal' if same else 'not equal'} within 0.1 %",
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pmpd", type=Path, help="checkout of SamsungLabs/PMPD")
    parser.add_argument("--any-precision", type=Path, help="checkout of SNU-ARC/any-precision-llm")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    if not (args.pmpd or args.any_precision):
        parser.error("give --pmpd or --any-precision, or both")
    rows: list[Row] = []
    if args.pmpd:
        schedulers = load_schedulers(args.pmpd)
        for part in (steps(schedulers), confidence(schedulers), classifier(schedulers), labels(args.pmpd)):
            rows += part
        rows += scores(args.pmpd, schedulers)
    if args.any_precision:
        rows += quantiser(args.any_precision)
    wrong = [row for row in rows if row[3] == "equal" and row[1] != row[2]]
    text = markdown_table(["compared", "reference code", "here", ""], rows) + "\n"
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    for row in wrong:
        sys.stdout.write(f"NOT EQUAL: {row[0]}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
