"""Bias compensation (Gong et al., arXiv 2404.01892): the bias that cancels the mean output error of a quantized weight.

``b' = b + W0^T mu - W_hat^T mu`` minimises the mean squared output error over all biases. What is left is the error under the
centred Gram matrix ``H - mu mu^T``, so a quantizer whose layer will be compensated should minimise that one
(`LayerStats.objective_gram`).

Deviation from the paper: one vector per output channel, never one per token, which would fix the sequence length.
"""

from __future__ import annotations

from magr_onnx.types import Array


def compensate(bias: Array | None, reference: Array, quantized: Array, mean: Array) -> Array:
    """The compensated bias ``(N,)`` float64.

    Args:
        bias: ``b (N,)``; None for zero.
        reference: ``W0 (K, N)``.
        quantized: ``W_hat (K, N)``, dequantized.
        mean: ``mu (K,)``, the mean input.
    """
    correction: Array = (reference.astype("float64") - quantized).T @ mean
    return correction if bias is None else bias + correction
