"""What an artifact is made by: a stage, its configuration and its inputs' recipes, and the key that they hash to.

A key is known without running anything. Knows neither the store nor what stages do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

KEY_LENGTH = 16


def recipe_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The one key function: sha256 of the recipe as canonical JSON, shortened to 16 hex digits."""
    recipe = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, eq=False)
class Root:
    """An input that the pipeline did not make, keyed by its content.

    Attributes:
        name: for people, e.g. a file's or a hub model's name.
        key: digest of the content, or a hub commit.
        locate: gives its path; may download. It is sent to other processes, so it is no lambda.
    """

    name: str
    key: str
    locate: Callable[[], Path]


@dataclass(frozen=True, eq=False)
class Node:
    """A stage applied to a configuration and inputs: an artifact's recipe."""

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        return recipe_key(self.stage, self.version, self.config, {n: i.key for n, i in self.inputs.items()})

    def ancestors(self) -> list[Node]:
        """This node after every node that it needs, each once, in an order that can be run."""
        seen: dict[str, Node] = {}

        def visit(node: Input) -> None:
            if isinstance(node, Node) and node.key not in seen:
                for parent in node.inputs.values():
                    visit(parent)
                seen[node.key] = node

        visit(self)
        return list(seen.values())


Input = Node | Root
