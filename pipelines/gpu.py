"""``report: gpu``: what a GPU gives on published shapes alone, without weights, data or evaluation.

Linear layers as the paper times them at every precision, and, for the Llama family, whole decode steps of a model with
random weights. Numbers carry that in their unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.machines import timed
from pmpd.artifacts import Node, Store, read_json
from pmpd.config import Config, ConfigError, GpuConfig
from pmpd.hardware.npu import published_shapes
from pmpd.records import FP16_BITS, Architecture
from pmpd.report import linears_table, steps_table
from pmpd.stages import RuntimeConfig
from pmpd.stages.evaluate import RESULTS_FILE
from pmpd.stages.timing import LATENCY, LINEARS, LatencyConfig, LinearsConfig

LLAMA_FAMILY = ("vicuna7b", "mobilellama", "llama3_1_8b", "smollm2")
POSITIONS = 8192
"""Of the random models; more than any context that is timed."""
COLUMNS = ("model", "op", "bits", "context_tokens", "out_features", "in_features", "cache", "unit", "value", "p10",
           "p90", "n", "weights", "engine", "machine", "key")  # fmt: skip


@dataclass(frozen=True)
class GpuCell:
    """One model's recipes; ``latency`` is None outside the Llama family."""

    model: str
    linears: Node
    latency: Node | None

    @property
    def targets(self) -> list[Node]:
        return [self.linears, *([self.latency] if self.latency else [])]


def gpu_cell(config: Config, store: Store, *, reading: bool = False) -> GpuCell:
    """The recipes of one model.

    Raises:
        ConfigError: a model without published shapes, hardware that is no GPU, or no GPU to time on.
    """
    name, hardware, budget, quantizer = config.model.name, config.hardware, config.budget, config.quantizer
    if not isinstance(hardware, GpuConfig):
        raise ConfigError(f"hardware={hardware.name} is not possible with report=gpu: gpu")
    if name not in published_shapes():
        raise ConfigError(f"model={name} is not possible with report=gpu: one of {', '.join(published_shapes())}")
    shape = published_shapes()[name]
    runtime = RuntimeConfig(config.model.dtype.value, "cuda").on_gpu()
    bits = [FP16_BITS, *range(quantizer.parent_bits, quantizer.seed_bits - 1, -1)]
    shapes = [list(pair) for pair in sorted(set(shape.linear_shapes))]

    def linears(machine: str) -> Node:
        timing = LinearsConfig(shapes, bits, quantizer.group_size, hardware.linear_forwards, runtime.dtype, machine)
        return LINEARS.node(timing)

    def latency(machine: str) -> Node:
        return LATENCY.node(
            LatencyConfig(
                bits=bits,
                contexts=list(budget.timing_contexts),
                num_tokens=budget.timing_tokens,
                random=_llama(shape),
                runtime=runtime,
                machine=machine,
            )
        )

    return GpuCell(
        name,
        timed(store, "cuda", linears, reading=reading),
        timed(store, "cuda", latency, reading=reading) if name in LLAMA_FAMILY else None,
    )


def write_gpu_report(cells: Sequence[GpuCell], store: Store, out: Path) -> str:
    """``results.csv`` and ``table.md`` below ``out``.

    Returns:
        the tables as Markdown.

    Raises:
        FileNotFoundError: a timing that the store does not hold.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    texts = []
    for cell in cells:
        timing = read_json(store.verify(cell.linears) / RESULTS_FILE)
        texts.append(f"## {cell.model}\n\nLinear layers, one input, {timing['weights']}, {_where(timing)}:\n")
        texts.append(linears_table(timing["rows"]) + "\n")
        rows += _linear_rows(cell, timing)
        if cell.latency is not None:
            timing = read_json(store.verify(cell.latency) / RESULTS_FILE)
            texts.append(f"Decoding one sequence, {timing['weights']}, {timing['engine']}, {_where(timing)}:\n")
            texts.append(steps_table(timing["rows"]) + "\n")
            rows += _step_rows(cell, cell.latency, timing)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    whole = dict.fromkeys(("context_tokens", "out_features", "in_features"), "Int64")  # empty where they do not apply
    frame.astype(whole).to_csv(out / "results.csv", index=False)
    text = "\n".join(texts)
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def _where(timing: dict[str, Any]) -> str:
    others = timing.get("other_processes")
    return timing["machine"] + (f", beside {others} other processes on the GPU" if others else "")


def _linear_rows(cell: GpuCell, timing: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "model": cell.model,
            "op": "linear",
            "cache": cache,
            "unit": "us self CUDA time a forward, mean",
            "value": row[f"{cache}_us"],
            "n": row["forwards"],
            "key": cell.linears.key,
            **{k: row[k] for k in ("bits", "out_features", "in_features")},
            **{k: timing[k] for k in ("weights", "machine")},
        }
        for row in timing["rows"]
        for cache in ("hot", "flushed")
    ]


def _step_rows(cell: GpuCell, node: Node, timing: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "model": cell.model,
            "op": "decode step",
            "unit": "ms, median",
            "value": row["median_ms"],
            "p10": row["p10_ms"],
            "p90": row["p90_ms"],
            "n": row["num_steps"],
            "key": node.key,
            **{k: row[k] for k in ("bits", "context_tokens")},
            **{k: timing[k] for k in ("weights", "engine", "machine")},
        }
        for row in timing["rows"]
    ]


def _llama(shape: Architecture) -> dict[str, Any]:
    """Configuration values of a Llama of that shape."""
    return {
        "model_type": "llama",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.linear_shapes[-1][1],
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": POSITIONS,
    }


__all__ = ["GpuCell", "gpu_cell", "write_gpu_report"]
