"""Intel's neural compressor for ONNX: MatMulNBits at 4 bits, and float weights rounded to the grid at others.

Graph optimization before quantization is off: it would fuse what the other tools are given unfused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from adapter import Rewindable, Task, save, serve


def quantize(task: Task, algorithm: str, symmetric: bool = False, **options: Any) -> None:
    import onnxruntime
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as tool

    if algorithm != "RTN":
        options["calibration_data_reader"] = Rewindable(task.calibration)
    quantizer = tool.MatMulNBitsQuantizer(
        str(task.model),
        block_size=task.block,
        is_symmetric=symmetric,
        n_bits=task.bits,
        algo_config=getattr(tool, f"{algorithm}WeightOnlyQuantConfig")(**options),
        optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    quantizer.process()
    model = quantizer.model
    save(getattr(model, "model", model), task)


METHODS = {
    "RTN": partial(quantize, algorithm="RTN"),
    "GPTQ": partial(quantize, algorithm="GPTQ"),
    "GPTQ, act-order": partial(quantize, algorithm="GPTQ", actorder=True),
    "GPTQ, mse": partial(quantize, algorithm="GPTQ", mse=True),
    "GPTQ, symmetric, mse": partial(quantize, algorithm="GPTQ", symmetric=True, mse=True),
    "AWQ": partial(quantize, algorithm="AWQ"),
    "AWQ, symmetric": partial(quantize, algorithm="AWQ", symmetric=True),
}

if __name__ == "__main__":
    serve("onnx-neural-compressor", METHODS)
