"""onnxsim's refinements of its symmetric 4-bit QDQ (codes -7 to 7, blocks of 32); TesseraQ alone takes fewer bits.

Calibration data are given as one batch where a method trains on batches of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from adapter import Task, at_opset, only, padded, save, serve


def quantize(task: Task, refine: str | None = None, **options: Any) -> None:
    if refine != "apply_tesseraq":
        only(4, task)
    import onnxsim

    model = padded(at_opset(task.model, 21), task.block)
    quantized = onnxsim.quantize_weight_only_int4(model)
    if refine is not None:
        quantized = getattr(onnxsim, refine)(model, quantized, calibration_data=task.batches(), **options)
    if isinstance(quantized, tuple):  # the model, and what became of each block
        quantized = quantized[0]
    save(quantized, task)


def tesseraq(task: Task) -> None:
    quantize(task, "apply_tesseraq", num_bits=task.bits)


def hqq(task: Task) -> None:
    only(4, task)
    import onnxsim

    save(onnxsim.quantize_weight_only_int4_hqq(padded(at_opset(task.model, 21), task.block), block_size=task.block), task)


METHODS = {
    "RTN": quantize,
    "HQQ": hqq,
    "GPTQ": partial(quantize, refine="apply_gptq"),
    "GPTAQ": partial(quantize, refine="apply_gptaq"),
    "Qronos": partial(quantize, refine="apply_qronos"),
    "QuantEase": partial(quantize, refine="apply_quantease"),
    "FOEM": partial(quantize, refine="apply_foem"),
    "AWQ": partial(quantize, refine="apply_awq"),
    "OmniQuant": partial(quantize, refine="apply_omniquant"),
    "AdaRound": partial(quantize, refine="apply_adaround"),
    "AutoRound": partial(quantize, refine="apply_autoround"),
    "FlexRound": partial(quantize, refine="apply_flexround"),
    "TesseraQ": tesseraq,
    "QAT by blocks": partial(quantize, refine="apply_qat_all_blocks", num_iterations=200, learn_scales=True),
}

if __name__ == "__main__":
    serve("onnxsim", METHODS)
