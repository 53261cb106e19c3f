"""Every stage a plan can have, by the name that pipeline text calls it.

To add one: write its file in a folder beside this file, and add its class here; emitters come from `magr_onnx.passes.emit.FORMATS`.
"""

from __future__ import annotations

from typing import TypeGuard

import onnx_ir as ir

from magr_onnx.passes.base import Stage
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layer_passes.activations import QuantizeActivations
from magr_onnx.passes.layer_passes.bias_compensation import CompensateBias
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layer_passes.embeddings import Embeddings
from magr_onnx.passes.layer_passes.error_feedback import ErrorFeedback
from magr_onnx.passes.layer_passes.low_rank import LowRank
from magr_onnx.passes.layer_passes.magr import MagR
from magr_onnx.passes.layer_passes.output_hessian import OutputHessian
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layer_passes.recurrent import Recurrent
from magr_onnx.passes.layer_passes.scale_tuning import TuneScales
from magr_onnx.passes.rewrites.equalize import Equalize
from magr_onnx.passes.rewrites.rotate import Rotate
from magr_onnx.passes.rewrites.split_outliers import SplitOutliers
from magr_onnx.passes.rewrites.split_salient import SplitSalient
from magr_onnx.passes.rewrites.twin_ranges import TwinRanges

BEFORE_EMITTERS: tuple[type[Stage], ...] = (
    Rotate,
    Equalize,
    SplitOutliers,
    SplitSalient,
    TwinRanges,
    ErrorFeedback,
    OutputHessian,
    MagR,
    QuantizeActivations,
    Quantize,
    LowRank,
    CompensateBias,
    TuneScales,
)
AFTER_EMITTERS: tuple[type[Stage], ...] = (Convolutions, Recurrent, Embeddings)


def stages() -> dict[str, type[Stage]]:
    """All stages by name, in the order that a plan has them."""
    return {kind.name: kind for kind in (*BEFORE_EMITTERS, *(form.emitter for form in FORMATS.values()), *AFTER_EMITTERS)}


def passes() -> dict[str, type[Stage]]:
    """Those that are onnx-ir passes, and work by themselves."""
    return {name: kind for name, kind in stages().items() if issubclass(kind, ir.passes.PassBase)}


def is_stage(value: object) -> TypeGuard[Stage]:
    """Whether a value is a stage, of the registry or of a caller's own."""
    return isinstance(value, Stage)


def is_pass(stage: Stage) -> TypeGuard[ir.passes.PassBase]:
    """Whether a stage works by itself."""
    return isinstance(stage, ir.passes.PassBase)
