"""Shapes of published models, so that an estimate needs neither weights nor a hub. ``shapes.csv`` names each source."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from pmpd.records import Architecture

SHAPES = Path(__file__).with_name("shapes.csv")


@cache
def published_shapes() -> dict[str, Architecture]:
    """Name -> decoder; matrices in the order query, key, value, output, (gate,) up, down."""
    with SHAPES.open(encoding="utf-8", newline="") as file:
        return {row["model"]: _architecture(row) for row in csv.DictReader(file)}


def _architecture(row: dict[str, str]) -> Architecture:
    hidden, mlp = int(row["hidden_size"]), int(row["intermediate_size"])
    heads, kv_heads, head_dim = (int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
    query, key = (heads * head_dim, hidden), (kv_heads * head_dim, hidden)
    up = [(mlp, hidden)] * (int(row["mlp_matrices"]) - 1)
    return Architecture(
        num_layers=int(row["num_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        linear_shapes=(query, key, key, (hidden, heads * head_dim), *up, (hidden, mlp)),
        vocab_size=int(row["vocab_size"]),
    )
