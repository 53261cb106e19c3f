"""Bias correction (Gong et al., arXiv 2404.01892): the bias that cancels the mean output error of a quantized layer.

``b' = b + W0^T mu - W_hat^T mu_q`` minimises the mean squared output error over all biases, where ``mu`` is the mean of the float input and
``mu_q`` that of the input as the quantized layer reads it (the same for weight-only quantization). The remaining error is that under the
centred Gram matrix ``H - mu mu^T``, so a quantizer whose layer will be corrected should minimise that one (`LayerStats.objective_gram`).

A mean over few samples is uncertain: the correction is shrunk by `shrinkage`.

Deviation from the paper: one vector per output channel, never one per token, which would fix the sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from magr_onnx.core.linalg import transposed_product
from magr_onnx.core.types import Array


def correction(target_mean: Array, quantized: Array, mean: Array) -> Array:
    """Return what to add to the bias, ``(N,)`` float64, or ``(N, m)`` of m parts of the samples.

    Args:
        target_mean: ``W0^T mu (N,)`` or ``(N, m)``, the mean target output, without its bias.
        quantized: ``W_hat (K, N)``, dequantized.
        mean: ``mu_q (K,)`` or ``(K, m)``, the mean input as the quantized layer reads it.
    """
    result: Array = target_mean - transposed_product(quantized, mean)
    return result


def shrinkage(total: Array, parts: Sequence[tuple[int, Array]], error: float = 0.0) -> float:
    """Return the factor in [0, 1] by which the correction ``total (N,)`` should be multiplied.

    A mean from few samples is uncertain, and a correction by noise moves the output more than it corrects. The correction is shrunk as
    James and Stein (1961) shrink means of many variables: by ``1 - variance / |total|^2``. The variance of the mean is estimated from
    ``parts`` of the samples (their rows, and their own correction ``(N,)``). These are the rows that the weight was solved from: where
    they are fewer than the inputs, it makes the same error on all of them, and another on any other row. So the variance is at least
    that of the mean of independent rows with the mean squared output error ``error``, which should be of rows held out.
    """
    rows = sum(count for count, _ in parts)
    if len(parts) < 2 or not rows:
        return 1.0
    spread = sum(count * float(np.square(part - total).sum()) for count, part in parts) / (rows * (len(parts) - 1))
    spread = max(spread, error / rows)
    power = float(np.square(total).sum())
    return max(0.0, 1 - spread / power) if power > 0 else 1.0
