"""The recipes of a model's nested copy: what its quantiser weights errors by, the quantiser, refits and tuning."""

from __future__ import annotations

from pmpd.artifacts import Input, Node
from pmpd.config import QuantizerConfig, QuantizerKind
from pmpd.stages import RuntimeConfig
from pmpd.stages.calibration import MOMENTS, SENSITIVITY, MomentsConfig, SensitivityConfig
from pmpd.stages.quantization import (
    QUANTIZE,
    QUANTIZE_JOINT,
    REFIT_TABLES,
    QuantizeConfig,
    QuantizeJointConfig,
    RefitTablesConfig,
)
from pmpd.stages.tuning import TUNE_TABLES, TuneTablesConfig

TUNING_BATCH = 4
"""Calibration windows of a tuning step."""


def sensitivity(model: Input, calibration: Node, runtime: RuntimeConfig) -> Node:
    """Mean squared gradients of the model's weights over the calibration text."""
    return SENSITIVITY.node(SensitivityConfig(runtime.differentiable()), model=model, texts=calibration)


def moments(model: Input, calibration: Node, runtime: RuntimeConfig) -> Node:
    """Second moments of the model's activations over the calibration text."""
    return MOMENTS.node(MomentsConfig(runtime.differentiable()), model=model, texts=calibration)


def nested_model(quantizer: QuantizerConfig, model: Input, calibration: Node, runtime: RuntimeConfig) -> Node:
    """The quantised model, its tables refitted, those of low precisions tuned, if that is asked for."""
    nested = _quantised(quantizer, model, calibration, runtime)
    if not quantizer.tuning_steps:
        return nested
    return TUNE_TABLES.node(
        TuneTablesConfig(
            bits=list(range(quantizer.seed_bits, min(quantizer.tuning_bits, quantizer.parent_bits) + 1)),
            steps=quantizer.tuning_steps,
            rate=quantizer.tuning_rate,
            batch_size=TUNING_BATCH,
            runtime=runtime.differentiable(),
        ),
        model=model,
        nested=nested,
        texts=calibration,
    )


def _quantised(quantizer: QuantizerConfig, model: Input, calibration: Node, runtime: RuntimeConfig) -> Node:
    common = (quantizer.seed_bits, quantizer.parent_bits, quantizer.group_size)
    match quantizer.kind:
        case QuantizerKind.anyprec:
            power, trust = quantizer.sensitivity_power, runtime.trust_remote_code
            nested = QUANTIZE.node(
                QuantizeConfig(*common, quantizer.solver.value, power, trust),
                model=model,
                sensitivity=sensitivity(model, calibration, runtime),
            )
            if not quantizer.refits:
                return nested
            return REFIT_TABLES.node(
                RefitTablesConfig(quantizer.refits, quantizer.damping, runtime.device),
                model=model,
                nested=nested,
                moments=moments(model, calibration, runtime),
            )
        case QuantizerKind.joint:
            return QUANTIZE_JOINT.node(
                QuantizeJointConfig(
                    *common,
                    focus_bits=quantizer.focus_bits,
                    high_share=quantizer.high_share,
                    damping=quantizer.damping,
                    refits=quantizer.refits,
                    sweeps=quantizer.sweeps,
                    outlier_share=quantizer.outlier_share,
                    device=runtime.device,
                    trust_remote_code=runtime.trust_remote_code,
                ),
                model=model,
                moments=moments(model, calibration, runtime),
            )
