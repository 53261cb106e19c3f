"""onnx-magr: post-training quantization of ONNX models for low bits and small accumulators."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from magr_onnx.api import Forecast, Inspection, Optimized, forecast, inspect, optimize, validate, verify
    from magr_onnx.config.arguments import FolderArguments, RunArguments
    from magr_onnx.config.layer_options import LayerOptions
    from magr_onnx.config.options import Options
    from magr_onnx.config.plans import build_pipeline
    from magr_onnx.config.presets import PRESETS, Preset
    from magr_onnx.config.recipe import Recipe
    from magr_onnx.core.overflow.accumulator import Accumulator
    from magr_onnx.core.overflow.targets import TARGETS, Target
    from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
    from magr_onnx.report.data import Report
    from magr_onnx.report.verification import Verification
    from magr_onnx.workflow.directory import OptimizedFolder, optimize_folder
    from magr_onnx.workflow.generate import Generated, Generation, generate

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "PRESETS", "TARGETS", "Accumulator", "CalibrationError", "DependencyError", "ExportError", "FolderArguments", "Forecast", "Generated",
    "Generation", "Inspection",
    "LayerOptions", "LayerStats", "MagrError", "ModelError", "NonFiniteError", "Optimized", "OptimizedFolder", "OptionError",
    "Options", "OutputError", "PipelineError", "Preset", "ProviderError", "QuantizedWeight", "Recipe", "RecipeError", "Report",
    "ReportError", "RunArguments", "RuntimeFailure", "Target", "Verification", "WeightSpec", "build_pipeline", "forecast", "generate",
    "inspect", "optimize", "optimize_folder", "validate", "verify",
]
# fmt: on

_MODULES = {
    "magr_onnx.api": ("Forecast", "Inspection", "Optimized", "forecast", "inspect", "optimize", "validate", "verify"),
    "magr_onnx.config.arguments": ("FolderArguments", "RunArguments"),
    "magr_onnx.config.layer_options": ("LayerOptions",),
    "magr_onnx.config.options": ("Options",),
    "magr_onnx.config.plans": ("build_pipeline",),
    "magr_onnx.config.presets": ("PRESETS", "Preset"),
    "magr_onnx.config.recipe": ("Recipe",),
    "magr_onnx.core.overflow.accumulator": ("Accumulator",),
    "magr_onnx.core.overflow.targets": ("TARGETS", "Target"),
    "magr_onnx.core.types": ("LayerStats", "QuantizedWeight", "WeightSpec"),
    "magr_onnx.report.data": ("Report",),
    "magr_onnx.report.verification": ("Verification",),
    "magr_onnx.workflow.directory": ("OptimizedFolder", "optimize_folder"),
    "magr_onnx.workflow.generate": ("Generated", "Generation", "generate"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("api", "cli", "config", "core", "errors", "model_io", "passes", "report", "runtime", "workflow")


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage, when it is first used: ``onnx-magr --help`` and a type checker need none of them."""
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
