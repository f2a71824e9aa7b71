"""Language models: where they come from, how they are read, and how a prompt becomes tokens."""

from pmpd.models.blocks import attach, block_index, block_linears, decoder_blocks
from pmpd.models.convert import materialize
from pmpd.models.errors import ModelError
from pmpd.models.load import architecture, context_length, load_model, load_tokenizer, read_config
from pmpd.models.prompt import Prompter
from pmpd.models.source import ModelSource, digest, folder, needs_conversion, resolve
from pmpd.models.weights import LazyWeights, linear_names

__all__ = [
    "LazyWeights",
    "ModelError",
    "ModelSource",
    "Prompter",
    "architecture",
    "attach",
    "block_index",
    "block_linears",
    "context_length",
    "decoder_blocks",
    "digest",
    "folder",
    "linear_names",
    "load_model",
    "load_tokenizer",
    "materialize",
    "needs_conversion",
    "read_config",
    "resolve",
]
