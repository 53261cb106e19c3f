"""AMD Quark for ONNX: its MATMUL_NBITS preset, 4 bits.

Pre-processing is skipped: it optimizes the graph, and a MatMul that becomes a Gemm would be left in float. Its GPTQ reads the first
batch alone, so it is given all samples as one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from adapter import Rewindable, Task, only, serve


def quantize(task: Task, algorithm: str, symmetric: bool = False, **gptq: Any) -> None:
    only(4, task)
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import Config
    from quark.onnx.quantization.config.legacy import QuantizationConfig

    options: dict[str, Any] = {
        "UseMatMulNBits": True,
        "MatMulNBitsParams": {"Algorithm": algorithm, "GroupSize": task.block, "Symmetric": symmetric, "Bits": 4, "AccuracyLevel": 0},
        "SkipPreprocess": True,
    }
    if algorithm == "GPTQ":
        options["GPTQParams"] = {"GroupSize": task.block, "PerChannel": True, "WeightSymmetric": symmetric, **gptq}
    reader = Rewindable(task.calibration, batch_size=1 << 20)
    config = Config(global_quant_config=QuantizationConfig(extra_options=options))
    ModelQuantizer(config).quantize_model(str(task.model), str(task.output), reader)


METHODS = {
    "default": partial(quantize, algorithm="DEFAULT"),
    "default, symmetric": partial(quantize, algorithm="DEFAULT", symmetric=True),
    "HQQ": partial(quantize, algorithm="HQQ"),
    "GPTQ": partial(quantize, algorithm="GPTQ"),
    "GPTQ, MSE": partial(quantize, algorithm="GPTQ", MSE=True),
    "GPTQ, symmetric": partial(quantize, algorithm="GPTQ", symmetric=True),
}

if __name__ == "__main__":
    serve("amd-quark", METHODS)
