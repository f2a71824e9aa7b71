"""Language models: where they come from, how they are read, and how a prompt becomes tokens."""

from pmpd.models.convert import materialize
from pmpd.models.errors import ModelError
from pmpd.models.source import ModelSource, digest, folder, needs_conversion, resolve

__all__ = [
    "ModelError",
    "ModelSource",
    "digest",
    "folder",
    "materialize",
    "needs_conversion",
    "resolve",
]
