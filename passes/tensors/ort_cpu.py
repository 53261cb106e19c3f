"""onnxruntime on CPUs: operators that its optimizer replaces by integer ones, or moves between QuantizeLinear and DequantizeLinear.

Linear layers are not here: their float result needs no grid, and their own emitter writes them.
"""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import ANY, Rules

RULES = Rules(
    name="ort-cpu",
    source="graphs optimized by onnxruntime 1.32.0 (tests/passes/test_tensors.py looks at those of the installed version)",
    computed={
        "Add": ANY,
        "AveragePool": ANY,
        "Concat": ANY,
        "GlobalAveragePool": ANY,
        "HardSigmoid": ANY,
        "HardSwish": ANY,
        "LeakyRelu": ANY,
        "Mul": ANY,
        "Sigmoid": ANY,
    },
    int4="cast",
    lowered=True,
    moved={
        "DepthToSpace": ANY,
        "Flatten": ANY,
        "Identity": ANY,
        "MaxPool": ANY,
        "Reshape": ANY,
        "Resize": {"mode": (None, "nearest")},
        "Slice": ANY,
        "Squeeze": ANY,
        "Tile": ANY,
        "Transpose": ANY,
        "Unsqueeze": ANY,
    },
)
