"""The dense-and-sparse model that a scheduler is compared with: its bits a weight are that scheduler's average.

Outliers cost bits beside the codes'. What they are charged is stated both ways: with their indices, and as the paper
does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pmpd.artifacts import read_json
from pmpd.models.blocks import SHARDS
from pmpd.quant import NestedWeight, Outliers, quantize_dense_sparse
from pmpd.quant.dense_sparse import NOMINAL_BITS
from pmpd.stages.base import Stage, read_summary, write_summary
from pmpd.stages.evaluate import RESULTS_FILE
from pmpd.stages.quantization import quantize_blocks


@dataclass(frozen=True)
class DenseSparseConfig:
    """The dense precision, and how outliers are chosen and paid for.

    Attributes:
        bits: of the dense part.
        outliers: ``sensitivity`` or ``magnitude``.
        accounting: ``stored``, indices included, or ``nominal``, the paper's.
    """

    bits: int
    group_size: int | None
    solver: str
    outliers: str
    accounting: str
    trust_remote_code: bool


def run_dense_sparse(config: DenseSparseConfig, inputs: Mapping[str, Path], out: Path) -> None:
    """Quantise every block linear to the average decode bits of the ``evaluation`` input, every matrix alike."""
    target = target_bits(read_json(inputs["evaluation"] / RESULTS_FILE))

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
    found = [o for file in sorted(out.glob(SHARDS)) for o in _outliers(file)]
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


def target_bits(results: list[dict[str, Any]]) -> float:
    """Average decode bits of an evaluation.

    Raises:
        ValueError: it took no decode step.
    """
    for row in results:
        if row["quantity"] == "average_bits":
            return float(row["value"])
    raise ValueError("the scheduler to match took no decode step, so it has no average bits")


def _outliers(file: Path) -> list[Outliers]:
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if ".outliers." in name}  # noqa: SIM118
    names = dict.fromkeys(name.partition(".outliers.")[0] for name in tensors)
    found = [Outliers.from_tensors(tensors, name) for name in names]
    return [o for o in found if o is not None]


DENSE_SPARSE = Stage("dense_sparse", 1, DenseSparseConfig, run_dense_sparse, "k-means over every weight, twice")
