"""Graph passes over onnx-ir: each usable alone, in `ir.passes.Sequential`, and in a textual pipeline."""

from magr_onnx.passes.activations import QuantizeActivations
from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.compensate import CompensateBias
from magr_onnx.passes.convolutions import Convolutions
from magr_onnx.passes.embeddings import Embeddings
from magr_onnx.passes.emit_int8 import EmitDynamicInt8, EmitQDQInt8
from magr_onnx.passes.emit_matmulnbits import EmitMatMulNBits
from magr_onnx.passes.emit_qdq import EmitQDQ
from magr_onnx.passes.equalize import Equalize
from magr_onnx.passes.feedback import ErrorFeedback
from magr_onnx.passes.job import Job, LayerPass, attach
from magr_onnx.passes.linear import LinearLayer, Reason, Skip, find
from magr_onnx.passes.low_rank import LowRank
from magr_onnx.passes.magr import MagR
from magr_onnx.passes.output_hessian import OutputHessian
from magr_onnx.passes.pipeline import PASSES, check, parse, prepare, run_layers, spec_of, text_of
from magr_onnx.passes.quantize import Quantize
from magr_onnx.passes.rewrite import Rewrite
from magr_onnx.passes.split_outliers import SplitOutliers
from magr_onnx.passes.twin_ranges import TwinRanges

__all__ = [
    "PASSES",
    "CompensateBias",
    "Convolutions",
    "Embeddings",
    "EmitDynamicInt8",
    "EmitMatMulNBits",
    "EmitQDQ",
    "EmitQDQInt8",
    "Equalize",
    "ErrorFeedback",
    "Job",
    "LayerPass",
    "LinearLayer",
    "LowRank",
    "MagR",
    "OutputHessian",
    "Quantize",
    "QuantizeActivations",
    "Reason",
    "Rewrite",
    "Skip",
    "SplitOutliers",
    "TwinRanges",
    "attach",
    "canonicalize",
    "check",
    "find",
    "parse",
    "prepare",
    "run_layers",
    "spec_of",
    "text_of",
]
