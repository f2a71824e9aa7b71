"""What a user can get wrong about a model; every message names the path and what to do."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be found, read or used."""
