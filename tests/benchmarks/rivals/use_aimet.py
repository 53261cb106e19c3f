"""Qualcomm's AIMET: a simulation with weights alone quantized, exported as QDQ. Its export knows 4 bits, not 2."""

from __future__ import annotations

from functools import partial

from adapter import Task, at_opset, only, padded, save, serve


def quantize(task: Task, symmetric: bool, seq_mse: bool = False, adaround: int = 0) -> None:
    only(4, task)
    import aimet_onnx
    from aimet_onnx.quantsim import set_blockwise_quantization_for_weights

    batches = task.batches()
    sim = aimet_onnx.QuantizationSimModel(
        padded(at_opset(task.model, 21), task.block), param_type=aimet_onnx.int4, activation_type=aimet_onnx.float16, dummy_input=batches[0]
    )
    set_blockwise_quantization_for_weights(sim, ("MatMul", "Gemm"), task.bits, symmetric, task.block, strict=True)
    if seq_mse:
        aimet_onnx.apply_seq_mse(sim, batches)
    if adaround:
        aimet_onnx.apply_adaround(sim, batches, num_iterations=adaround)
    sim.compute_encodings(batches[:1])
    save(sim.to_onnx_qdq(prequantize_constants=True), task)


METHODS = {
    "min-max, symmetric": partial(quantize, symmetric=True),
    "min-max": partial(quantize, symmetric=False),
    "SeqMSE, symmetric": partial(quantize, symmetric=True, seq_mse=True),
    "SeqMSE": partial(quantize, symmetric=False, seq_mse=True),
    "AdaRound, symmetric": partial(quantize, symmetric=True, adaround=15000),
    "SeqMSE + AdaRound, symmetric": partial(quantize, symmetric=True, seq_mse=True, adaround=15000),
}

if __name__ == "__main__":
    serve("aimet-onnx", METHODS)
