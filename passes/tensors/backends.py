"""The registry of runtimes whose rules the format ``qdq-full`` can follow.

To add one, write its `Rules` in a file of this folder, and add them to `BACKENDS`.
"""

from __future__ import annotations

from magr_onnx.passes.tensors import coreml, openvino, ort_cpu, qnn_htp, tensorrt, vitisai, xnnpack
from magr_onnx.passes.tensors.rules import Rules

BACKENDS: dict[str, Rules] = {
    rules.name: rules
    for rules in (ort_cpu.RULES, qnn_htp.RULES, openvino.RULES, tensorrt.RULES, vitisai.RULES, xnnpack.RULES, coreml.RULES)
}
"""By name; the first is the default."""
