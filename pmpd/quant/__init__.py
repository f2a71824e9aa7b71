"""The nested quantisers: what errors are weighted by, codes and tables, packed weights, the layer that reads them."""

from pmpd.quant.dense_sparse import quantize_dense_sparse
from pmpd.quant.joint import JointOptions, quantize_jointly
from pmpd.quant.linear import NestedLinear, PrecisionCell
from pmpd.quant.moments import accumulate_moments
from pmpd.quant.nested import NestedWeight, quantize_weight
from pmpd.quant.refit import refit_tables
from pmpd.quant.sensitivity import accumulate
from pmpd.quant.sparse import Outliers, highest, take_outliers
from pmpd.quant.tuning import tune_tables

__all__ = [
    "JointOptions",
    "NestedLinear",
    "NestedWeight",
    "Outliers",
    "PrecisionCell",
    "accumulate",
    "accumulate_moments",
    "highest",
    "quantize_dense_sparse",
    "quantize_jointly",
    "quantize_weight",
    "refit_tables",
    "take_outliers",
    "tune_tables",
]
