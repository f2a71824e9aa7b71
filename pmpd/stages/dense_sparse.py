"""The dense-and-sparse model that a scheduler is compared with: its bits a weight are that scheduler's average.

Outliers cost bits beside the codes'. What they are charged is stated both ways: with their indices, and as the paper
does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pmpd.quant import NestedWeight, quantize_dense_sparse
from pmpd.quant.dense_sparse import NOMINAL_BITS
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.bits import chosen, mean_bits, read_outliers
from pmpd.stages.quantization import quantize_blocks


@dataclass(frozen=True)
class DenseSparseConfig:
    """The dense precision, and how outliers are chosen and paid for.

    Attributes:
        bits: of the dense part.
        outliers: ``sensitivity`` or ``magnitude``.
        accounting: ``stored``, indices included, or ``nominal``, the paper's.
        schedule: of the scheduler to match, by name; None when the ``choice`` or ``decisions`` input says it.
    """

    bits: int
    group_size: int | None
    solver: str
    outliers: str
    accounting: str
    schedule: str | None
    max_new_tokens: int
    trust_remote_code: bool


def run_dense_sparse(config: DenseSparseConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Quantise every block linear to the average decode bits of another scheduler, every matrix alike."""
    target = target_bits(inputs, config.schedule, config.max_new_tokens)

    def quantize(weight: Tensor, sensitivity: Tensor | None) -> NestedWeight:
        assert sensitivity is not None
        return quantize_dense_sparse(
            weight.float(),
            sensitivity.float(),
            bits=config.bits,
            extra_bits=target - config.bits,
            outliers=config.outliers,
            accounting=config.accounting,
            group_size=config.group_size,
            solver=config.solver,
        )

    quantize_blocks(quantize, inputs["model"], inputs["sensitivity"], config.trust_remote_code, out)
    found = read_outliers(out)
    num_weights = read_summary(out)["metrics"]["num_weights"]
    count = sum(len(o.values) for o in found)
    write_summary(
        out,
        read_summary(out)["metrics"]
        | {
            "dense_bits": config.bits,
            "target_bits": target,
            "num_outliers": count,
            "outlier_share": count / num_weights,
            "outlier_bits": sum(o.stored_bits for o in found) / num_weights,
            "nominal_outlier_bits": NOMINAL_BITS * count / num_weights,
        },
    )


def target_bits(inputs: Mapping[str, Path], schedule: str | None, max_new_tokens: int) -> float:
    """Average decode bits of the completions that the scheduler to match chose.

    Raises:
        ValueError: it took no decode step.
    """
    completions = list(chosen(inputs, schedule, max_new_tokens).values())
    found = mean_bits(completions, extra_bits=0.0)
    if found is None:
        raise ValueError("the scheduler to match took no decode step, so it has no average bits")
    return found.value()


DENSE_SPARSE = Stage("dense_sparse", 2, DenseSparseConfig, run_dense_sparse, "k-means over every weight, twice")
