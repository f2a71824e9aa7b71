"""Which layers of a decoder are quantised: the linear layers of its blocks, whatever the family calls them.

The embedding and the output head stay as they are. A block weight that is no ``nn.Linear`` would stay at 16 bits
unseen, so it is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import nn

from pmpd.models.errors import ModelError
from pmpd.quant import NestedLinear, NestedWeight, PrecisionCell

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # 2 s to import, which a plan does not need

SHARDS = "block_*.safetensors"
"""Files of a nested model, in any split of its layers."""


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by module path, in the model's order.

    Raises:
        ModelError: no blocks, or a matrix in them that is no ``nn.Linear`` (GPT-2's Conv1D, fused experts).
    """
    path, blocks = decoder_blocks(model)
    linears: dict[str, nn.Linear] = {}
    for name, module in blocks.named_modules(prefix=path):
        if isinstance(module, nn.Linear):
            linears[name] = module
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise ModelError(
                    f"{name}.{own} of this {type(model).__name__} is a {type(module).__name__}, and only nn.Linear "
                    "layers can be quantised: models of this family are not supported"
                )
    if not linears:
        raise ModelError(f"{path} of this {type(model).__name__} has no linear layers")
    return linears


def block_index(name: str) -> int:
    """The block, from 0, that a layer of :func:`block_linears` is in: the first number of its path."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def attach(model: PreTrainedModel, shards: Path, max_bits: int | None = None) -> PrecisionCell:
    """Replace the block linears by nested ones that share the cell returned; 16 bits is still the original model.

    Args:
        shards: a folder of :data:`SHARDS` with ``NestedWeight.to_tensors(<module path>)`` of every layer.
        max_bits: leave what only precisions above it need; None for all.

    Raises:
        ModelError: the nested model is another model's.
    """
    files = sorted(shards.glob(SHARDS))
    if not files:
        raise ModelError(f"no nested model in {shards}: expected {SHARDS}")
    linears = block_linears(model)
    cell = PrecisionCell()
    for file in files:
        tensors = load_file(file)
        for name in sorted({key.rsplit(".planes", 1)[0] for key in tensors if key.endswith(".planes")}):
            linear = linears.pop(name, None)
            if linear is None:
                raise ModelError(f"{file} has a layer {name} and the model has not: it was made from another model")
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            try:
                weight = NestedWeight.from_tensors(own, name)
                layer = NestedLinear(weight if max_bits is None else weight.prefix(max_bits), linear, cell)
            except ValueError as error:
                raise ModelError(f"{file}, layer {name}: {error}") from error
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    if linears:
        raise ModelError(f"{shards} lacks {len(linears)} layers of the model, the first {next(iter(linears))}")
    return cell


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost list with as many entries as the config has layers, and its path.

    Raises:
        ModelError: none.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ModelError(f"this {type(model).__name__} has no list of {num_layers} decoder blocks: it is not supported")
