"""What a user can get wrong about a model; every message names the path and what to do."""

from __future__ import annotations

MODEL_PATH = "the model's path (model.path= of a run, --model of a chat)"
"""How messages name what a user gave."""


class ModelError(ValueError):
    """A model that cannot be found, read or used."""
