"""Bias correction (Gong et al., arXiv 2404.01892): the bias that cancels the mean output error of a quantized layer.

``b' = b + W0^T mu - W_hat^T mu_q`` minimises the mean squared output error over all biases, where ``mu`` is the mean of the float input and
``mu_q`` that of the input as the quantized layer reads it (the same for weight-only quantization). The remaining error is that under the
centred Gram matrix ``H - mu mu^T``, so a quantizer whose layer will be corrected should minimise that one (`LayerStats.objective_gram`).

Deviation from the paper: one vector per output channel, never one per token, which would fix the sequence length.
"""

from __future__ import annotations

from magr_onnx.core.types import Array


def compensate(bias: Array | None, target_mean: Array, quantized: Array, mean: Array) -> Array:
    """Return the corrected bias ``(N,)`` float64.

    Args:
        bias: ``b (N,)``; None for zero.
        target_mean: ``W0^T mu (N,)``, the mean target output, without its bias.
        quantized: ``W_hat (K, N)``, dequantized.
        mean: ``mu_q (K,)``, the mean input as the quantized layer reads it.
    """
    correction: Array = target_mean - quantized.astype("float64").T @ mean
    return correction if bias is None else bias + correction
