"""Graph passes over onnx-ir: each usable alone, in `ir.passes.Sequential`, and in a textual pipeline."""

from magr_onnx.passes.base import Emitted, Emitter, LayerPass, ModelPass, Stage
from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.emit.int8 import EmitDynamicInt8, EmitQDQInt8
from magr_onnx.passes.emit.matmulnbits import EmitMatMulNBits
from magr_onnx.passes.emit.qdq import EmitQDQ
from magr_onnx.passes.emit.qdq_full import EmitQDQFull
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
from magr_onnx.passes.layer_state import attach
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layerwise import SolvedLayer, run_layers
from magr_onnx.passes.plan import Plan
from magr_onnx.passes.rewrites.base import Rewrite
from magr_onnx.passes.rewrites.equalize import Equalize
from magr_onnx.passes.rewrites.rotate import Rotate
from magr_onnx.passes.rewrites.split_outliers import SplitOutliers
from magr_onnx.passes.rewrites.split_salient import SplitSalient
from magr_onnx.passes.rewrites.twin_ranges import TwinRanges
from magr_onnx.report.reasons import Reason, Skip

__all__ = [
    "CompensateBias",
    "Convolutions",
    "Embeddings",
    "EmitDynamicInt8",
    "EmitMatMulNBits",
    "EmitQDQ",
    "EmitQDQFull",
    "EmitQDQInt8",
    "Emitted",
    "Emitter",
    "Equalize",
    "ErrorFeedback",
    "LayerPass",
    "LinearLayer",
    "LowRank",
    "MagR",
    "ModelPass",
    "OutputHessian",
    "Plan",
    "Quantize",
    "QuantizeActivations",
    "Reason",
    "Recurrent",
    "Rewrite",
    "Rotate",
    "Skip",
    "SolvedLayer",
    "SplitOutliers",
    "SplitSalient",
    "Stage",
    "TuneScales",
    "TwinRanges",
    "attach",
    "canonicalize",
    "find",
    "run_layers",
]
