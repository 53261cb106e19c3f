"""onnx-quantize: QDQ, rounding with or without a search of the range (its GPTQ is per channel only)."""

from __future__ import annotations

from functools import partial

from adapter import Task, at_opset, only, padded, save, serve


def quantize(task: Task, symmetric: bool, mse: bool) -> None:
    only(4, task)
    import onnx_quantize

    config = onnx_quantize.QConfig(
        is_static=False,
        weights_only=True,
        weights_dtype="int4" if symmetric else "uint4",
        weights_symmetric=symmetric,
        group_size=task.block,
        mse=mse,
    )
    save(onnx_quantize.quantize(padded(at_opset(task.model, 21), task.block), config), task)


METHODS = {
    "RTN": partial(quantize, symmetric=False, mse=False),
    "RTN, mse": partial(quantize, symmetric=False, mse=True),
    "RTN, symmetric, mse": partial(quantize, symmetric=True, mse=True),
}

if __name__ == "__main__":
    serve("onnx-quantize", METHODS)
