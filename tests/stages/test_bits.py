"""Bits that outliers add to what the codes read, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmpd.artifacts import write_tensors
from pmpd.quant import quantize_dense_sparse
from pmpd.records import Completion, Generation, Schedule
from pmpd.stages.base import write_summary
from pmpd.stages.bits import bits_results, outlier_bits, step_bits


def test_outliers_are_charged_at_every_nested_precision_and_not_at_fp16() -> None:
    assert step_bits([16, 4, 2], 0.25) == [16, 4.25, 2.25]
    own = [
        Completion("one", (Generation(Schedule.parse("4:4@1,2"), 9, (1, 2, 3), "", True),)),  # decodes at 4, 2
        Completion("fp16", (Generation(Schedule.uniform(16), 9, (1, 2), "", True),)),
        Completion("no step", (Generation(Schedule.uniform(4), 9, (1,), "", True),)),
    ]
    found = {row["quantity"]: row["value"] for row in bits_results(own, 20, 0, 0.25)}
    assert found["average_bits"] == pytest.approx((3.25 + 16) / 2)
    assert found["average_bits_tokens"] == pytest.approx((4.25 + 2.25 + 16) / 3)
    assert found["no_decode_step"] == 1


def test_outlier_bits_are_what_the_stored_outliers_take_over_all_weights(tmp_path: Path) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    nested = quantize_dense_sparse(
        weight, torch.ones(8, 64), bits=3, extra_bits=0.5, outliers="magnitude", accounting="stored"
    )
    assert nested.outliers is not None
    write_tensors(tmp_path / "block_000.safetensors", nested.to_tensors("layer"))
    write_summary(tmp_path, {"num_weights": 2 * weight.numel()})  # as if another matrix had none
    kept = len(nested.outliers.values)
    # A float16 value and a 16-bit column each, and a 16-bit count a row.
    assert outlier_bits({"outliers": tmp_path}) == pytest.approx((32 * kept + 16 * 8) / (2 * 8 * 64))
    assert outlier_bits({}) == 0
