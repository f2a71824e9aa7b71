"""Progressive mixed-precision decoding: one nested model, several precisions, a schedule between them.

import pmpd

model = pmpd.load("smollm2")
for piece in model.generate("Why is the sky blue?", scheduler="static"):
    print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmpd.generate import Model, Piece
    from pmpd.loading import load

__version__ = "0.1.0"
__all__ = ["Model", "Piece", "load"]


def __getattr__(name: str) -> Any:
    """The door's names, imported when first asked for: ``import pmpd`` itself costs nothing."""
    if name == "load":
        from pmpd.loading import load

        return load
    if name in ("Model", "Piece"):
        from pmpd import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'pmpd' has no attribute {name!r}")
