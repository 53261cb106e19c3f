"""onnx-magr: post-training quantization of ONNX models for low bits and small accumulators."""

from magr_onnx.api import Inspection, Optimized, inspect, optimize, validate, verify
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import Options, build_pipeline
from magr_onnx.config.presets import PRESETS, Preset
from magr_onnx.config.recipe import Recipe
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import TARGETS, Target
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from magr_onnx.errors import (
    CalibrationError,
    DependencyError,
    ExportError,
    MagrError,
    ModelError,
    NonFiniteError,
    OptionError,
    OutputError,
    PipelineError,
    ProviderError,
    RecipeError,
    ReportError,
    RuntimeFailure,
)
from magr_onnx.report.data import Report
from magr_onnx.report.verification import Verification
from magr_onnx.workflow.directory import OptimizedFolder, optimize_folder

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "TARGETS",
    "Accumulator",
    "CalibrationError",
    "DependencyError",
    "ExportError",
    "Inspection",
    "LayerOptions",
    "LayerStats",
    "MagrError",
    "ModelError",
    "NonFiniteError",
    "Optimized",
    "OptimizedFolder",
    "OptionError",
    "Options",
    "OutputError",
    "PipelineError",
    "Preset",
    "ProviderError",
    "QuantizedWeight",
    "Recipe",
    "RecipeError",
    "Report",
    "ReportError",
    "RuntimeFailure",
    "Target",
    "Verification",
    "WeightSpec",
    "build_pipeline",
    "inspect",
    "optimize",
    "optimize_folder",
    "validate",
    "verify",
]
