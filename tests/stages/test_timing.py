"""Steps of a model are timed at every context and precision that it has room for, and the record says on what."""

from __future__ import annotations

from pathlib import Path

import torch

from pmpd.artifacts import read_json
from pmpd.stages import RuntimeConfig, read_summary
from pmpd.stages.evaluate import RESULTS_FILE
from pmpd.stages.timing import LatencyConfig, run_latency

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
}


def test_random_weights_are_timed_from_a_configuration_and_named(tmp_path: Path) -> None:
    config = LatencyConfig([16, 4, 2], [8, 32, 500], 5, LLAMA, RuntimeConfig("float32", "cpu"), "here")
    run_latency(config, {}, tmp_path)
    timing = read_json(tmp_path / RESULTS_FILE)
    assert timing["weights"] == "random weights"
    assert "dequantised weights: bits save no time" in timing["engine"]
    assert f"{torch.get_num_threads()} threads" in timing["machine"]
    assert [(r["context_tokens"], r["bits"]) for r in timing["rows"]] == [
        (context, bits) for context in (8, 32) for bits in (16, 4, 2)
    ]
    assert all(0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"] and r["num_steps"] == 5 for r in timing["rows"])
    assert read_summary(tmp_path)["metrics"]["latency_4_bits_ms"] == timing["rows"][1]["median_ms"]


def test_a_context_that_no_model_has_room_for_becomes_the_longest(tmp_path: Path) -> None:
    config = LatencyConfig([16], [500], 5, LLAMA, RuntimeConfig("float32", "cpu"), "here")
    run_latency(config, {}, tmp_path)
    [row] = read_json(tmp_path / RESULTS_FILE)["rows"]
    assert row["context_tokens"] == 58
