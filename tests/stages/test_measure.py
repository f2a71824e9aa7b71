"""The estimate of an evaluation against sums over its samples, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmpd.artifacts import read_json, write_json, write_jsonl
from pmpd.hardware.npu import NPU, StoredWeights, decode_forward, prefill_forward
from pmpd.models import architecture
from pmpd.records import Completion, Generation, Schedule
from pmpd.stages.evaluate import COMPLETIONS_FILE, RESULTS_FILE
from pmpd.stages.measure import EstimateConfig, GainConfig, run_estimate, run_gain

CONSTANTS = {"name": "n", "num_macs": 4096, "clock_hz": 1e9, "bandwidth_bytes_s": 32e9, "count_tables": True}


def completion(name: str, *turns: tuple[str, int, int]) -> Completion:
    generations = [
        Generation(Schedule.parse(schedule), prompt, tuple(range(tokens)), "", True)
        for schedule, prompt, tokens in turns
    ]
    return Completion(name, tuple(generations))


def test_rates_and_gains_are_means_over_samples_of_their_own_steps(tiny_llama: Path, tmp_path: Path) -> None:
    samples = [
        completion("one", ("4:4@2,2", 20, 6)),
        completion("two turns", ("4:4@1,2", 10, 4), ("4:2", 40, 3)),
        completion("one token", ("4:4@2,2", 30, 1)),  # no decode step: no throughput, but a prefill
    ]
    rows = [{"id": s.sample_id, "generations": [g.to_json() for g in s.generations]} for s in samples]
    write_jsonl(tmp_path / COMPLETIONS_FILE, rows)
    config = EstimateConfig(CONSTANTS, 8, 16, False, resamples=50, seed=0)
    out = tmp_path / "out"
    out.mkdir()
    run_estimate(config, {"evaluation": tmp_path, "model": tiny_llama}, out)

    npu, shape, weights = NPU(**CONSTANTS), architecture(tiny_llama), StoredWeights(8, 16)

    def decode_s(generation: Generation, fp16: bool) -> list[float]:
        return [
            float(decode_forward(npu, shape, 16 if fp16 else bits, generation.prompt_tokens + t, weights).total_s)
            for t, bits in enumerate(generation.decode_bits, start=1)
        ]

    def prefill_s(generation: Generation, fp16: bool) -> float:
        bits = 16 if fp16 else generation.schedule.prefill_bits
        return float(prefill_forward(npu, shape, bits, generation.prompt_tokens, weights).total_s)

    rates, gains, totals, bits = [], [], [], []
    for sample in samples:
        own, fp16 = ([s for g in sample.generations for s in decode_s(g, half)] for half in (False, True))
        if own:
            rates.append(len(own) / sum(own))
            gains.append(sum(fp16) / sum(own))
            bits.append(sum(s * b for s, b in zip(own, sample.decode_bits, strict=True)) / sum(own))
        own_prefill, fp16_prefill = (sum(prefill_s(g, half) for g in sample.generations) for half in (False, True))
        totals.append((fp16_prefill + sum(fp16)) / (own_prefill + sum(own)))
    found = {row["quantity"]: row for row in read_json(out / RESULTS_FILE)}
    for quantity, values in (
        ("npu_decode_throughput", rates),
        ("npu_decode_speedup", gains),
        ("npu_total_speedup", totals),
        ("average_bits_time", bits),
    ):
        assert found[quantity]["value"] == pytest.approx(sum(values) / len(values))
        assert found[quantity]["n"] == len(values)
    assert "head not counted, tables counted, KV cache at 8 bits" in found["npu_decode_speedup"]["unit"]


def test_measured_steps_are_interpolated_and_compared_with_fp16_and_high(tmp_path: Path) -> None:
    samples = [completion("one", ("4:4@1,2", 99, 4)), completion("one token", ("4:4@1,2", 5, 1))]
    rows = [{"id": s.sample_id, "generations": [g.to_json() for g in s.generations]} for s in samples]
    write_jsonl(tmp_path / COMPLETIONS_FILE, rows)
    latency, out = tmp_path / "latency", tmp_path / "out"
    latency.mkdir()
    out.mkdir()
    # 16 bits: 10 ms at 100 tokens, 12 at 102; 4 bits: 4 and 6; 2 bits: 2 and 4; beyond 102 as at 102.
    timed = [(16, 100, 10.0), (16, 102, 12.0), (4, 102, 6.0), (4, 100, 4.0), (2, 100, 2.0), (2, 102, 4.0)]
    table = [{"bits": b, "context_tokens": c, "median_ms": ms} for b, c, ms in timed]
    found = {"machine": "M", "engine": "graphs", "weights": "random weights", "rows": table}
    write_json(latency / RESULTS_FILE, found)
    run_gain(GainConfig(high_bits=4, resamples=50, seed=0), {"evaluation": tmp_path, "latency": latency}, out)
    results = {row["quantity"]: row for row in read_json(out / RESULTS_FILE)}
    # Steps at contexts 100, 101, 102: 4 ms at 4 bits, then 3 and 4 ms at 2 bits.
    assert results["gpu_decode_throughput"]["value"] == pytest.approx(3 / 0.011)
    assert results["gpu_decode_speedup"]["value"] == pytest.approx((10 + 11 + 12) / 11)
    assert results["gpu_decode_speedup_over_high"]["value"] == pytest.approx((4 + 5 + 6) / 11)
    assert results["average_bits_time"]["value"] == pytest.approx((4 * 4 + 2 * 3 + 2 * 4) / 11)
    assert results["gpu_decode_speedup"]["n"] == 1
    assert "on M, measured steps; graphs; random weights" in results["gpu_decode_speedup"]["unit"]
