"""onnxruntime on CPUs: operators that its optimizer replaces by integer ones, or moves between QuantizeLinear and DequantizeLinear.

Linear layers are not here: their float result needs no grid, and their own emitter writes them.
"""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Required, Rules

_ANY: Required = {}

RULES = Rules(
    name="ort-cpu",
    source="graphs optimized by onnxruntime 1.32.0 (tests/passes/tensors/test_ort_cpu.py looks at those of the installed version)",
    computed={
        "Add": _ANY,
        "AveragePool": _ANY,
        "Concat": _ANY,
        "GlobalAveragePool": _ANY,
        "LeakyRelu": _ANY,
        "Mul": _ANY,
        "Sigmoid": _ANY,
    },
    moved={
        "DepthToSpace": _ANY,
        "Flatten": _ANY,
        "Identity": _ANY,
        "MaxPool": _ANY,
        "Reshape": _ANY,
        "Resize": {"mode": (None, "nearest")},
        "Slice": _ANY,
        "Squeeze": _ANY,
        "Tile": _ANY,
        "Transpose": _ANY,
        "Unsqueeze": _ANY,
    },
)
