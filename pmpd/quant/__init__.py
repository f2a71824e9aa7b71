"""The nested quantiser: sensitivity, clusters, packed weights, and the layer that reads them."""

from pmpd.quant.linear import NestedLinear, PrecisionCell
from pmpd.quant.nested import NestedWeight, quantize_weight
from pmpd.quant.sensitivity import accumulate

__all__ = ["NestedLinear", "NestedWeight", "PrecisionCell", "accumulate", "quantize_weight"]
