"""Progressive mixed-precision decoding: one nested model, several precisions, a schedule between them."""

__version__ = "0.1.0"
