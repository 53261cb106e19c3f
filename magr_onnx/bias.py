"""Bias compensation (Gong et al., arXiv 2404.01892): the bias that cancels the mean output error of a quantized layer.

``b' = b + W0^T mu - W_hat^T mu_q`` minimises the mean squared output error over all biases, where ``mu`` is the mean of the float input and
``mu_q`` that of the input as the quantized layer reads it (the same for weight-only quantization). What is left is the error under the
centred Gram matrix ``H - mu mu^T``, so a quantizer whose layer will be compensated should minimise that one
(`LayerStats.objective_gram`).

Deviation from the paper: one vector per output channel, never one per token, which would fix the sequence length.
"""

from __future__ import annotations

from magr_onnx.types import Array


def compensate(bias: Array | None, reference: Array, quantized: Array, mean: Array, quantized_mean: Array | None = None) -> Array:
    """The compensated bias ``(N,)`` float64.

    Args:
        bias: ``b (N,)``; None for zero.
        reference: ``W0 (K, N)``.
        quantized: ``W_hat (K, N)``, dequantized.
        mean: ``mu (K,)``, the mean input.
        quantized_mean: ``mu_q (K,)``, the mean of the quantized input; None where the input stays float.
    """
    correction: Array = (reference.astype("float64") - quantized).T @ mean
    if quantized_mean is not None:
        correction += quantized.astype("float64").T @ (mean - quantized_mean)
    return correction if bias is None else bias + correction
