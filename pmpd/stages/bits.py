"""Which completions a scheduler chose, and the bits a weight that their steps read: codes, and outliers where the model
that was decoded has some. Outliers are read at every nested precision, never at fp16.

Knows neither scores nor times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from pmpd.models.blocks import SHARDS
from pmpd.quant import Outliers
from pmpd.records import FP16_BITS, Completion, Schedule
from pmpd.stages.base import read_summary
from pmpd.stages.decide import read_decisions
from pmpd.stages.fit_static import read_choice
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.scoring import Scores, exact, mean_scores, result


def chosen(inputs: Mapping[str, Path], schedule: str | None, max_new_tokens: int) -> dict[str, Completion]:
    """A scheduler's completions by sample id: the ``decisions`` input, or what the ``rollouts*`` inputs have of the
    ``choice`` input's schedule, or of ``schedule``."""
    if "decisions" in inputs:
        return read_decisions(inputs["decisions"])
    table = read_rollouts(*(path for name, path in inputs.items() if name.startswith("rollouts")))
    one = read_choice(inputs["choice"]) if "choice" in inputs else Schedule.parse(str(schedule))
    return table[one.canonical(max_new_tokens)]


def read_outliers(nested: Path) -> list[Outliers]:
    """The outliers of every matrix of a nested model that has some."""
    found = []
    for file in sorted(nested.glob(SHARDS)):
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys() if ".outliers." in name}  # noqa: SIM118
        names = dict.fromkeys(name.partition(".outliers.")[0] for name in tensors)
        found += [o for name in names if (o := Outliers.from_tensors(tensors, name)) is not None]
    return found


def outlier_bits(inputs: Mapping[str, Path]) -> float:
    """Bits a weight that the ``outliers`` input, the nested model that was decoded, adds to a step; 0 without it."""
    if "outliers" not in inputs:
        return 0.0
    nested = inputs["outliers"]
    return sum(o.stored_bits for o in read_outliers(nested)) / float(read_summary(nested)["metrics"]["num_weights"])


def step_bits(bits: Sequence[int], extra_bits: float) -> list[float]:
    """Bits a weight that each step reads; ``extra_bits``: what outliers add to a nested precision."""
    return [b if b == FP16_BITS else b + extra_bits for b in bits]


def mean_bits(completions: Sequence[Completion], extra_bits: float) -> Scores | None:
    """Average bits of every completion that took a decode step; None where none did."""
    read = [step_bits(c.decode_bits, extra_bits) for c in completions if c.decode_bits]
    return mean_scores([sum(bits) / len(bits) for bits in read]) if read else None


def bits_results(own: Sequence[Completion], resamples: int, seed: int, extra_bits: float) -> list[dict[str, Any]]:
    """Average bits over sequences (the paper's), over tokens, and how many sequences had no decode step."""
    rows = []
    decoded = [step_bits(c.decode_bits, extra_bits) for c in own if c.decode_bits]
    by_sequence = mean_bits(own, extra_bits)
    if by_sequence is not None:
        rows.append(result("average_bits", "bits, mean over sequences", by_sequence.interval(resamples, seed)))
        by_token = Scores(
            np.array([[sum(bits), len(bits)] for bits in decoded], float), lambda total: total[..., 0] / total[..., 1]
        )
        rows.append(result("average_bits_tokens", "bits, mean over tokens", by_token.interval(resamples, seed)))
    lengths = mean_scores([sum(len(g.token_ids) for g in c.generations) for c in own])
    rows.append(result("new_tokens", "tokens a sample", lengths.interval(resamples, seed)))
    rows.append(exact("no_decode_step", "samples", len(own) - len(decoded), len(own)))
    return rows
