"""The noise of quantized models at their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.report.validation import OutputMetrics
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.validate import comparing_with
from magr_onnx.runtime.ort.session import Arithmetic

EXACT = 1e-15  # noise that none is taken for


def noises(reference: Path | ir.Model, candidates: Sequence[Path | ir.Model], data: Batches, provider: str, mask: str | None) -> Array:
    """Measure the noise of candidates relative to the energy of the reference's outputs, the mean over outputs.

    Args:
        reference: The float model.
        candidates: Models with the same outputs.
        data: What to run all of them on.
        provider: Where to run them.
        mask: Input whose zero elements mark rows to leave out.

    Returns:
        A number for each candidate.

    Raises:
        ModelError: They have no output in common.
        RuntimeFailure: A model does not run.
    """
    with comparing_with(reference, data, provider, mask, losses=False) as compare:
        return np.array([mean_noise(compare(model, Arithmetic.DEFAULT, None).outputs) for model in candidates])


def mean_noise(outputs: Sequence[OutputMetrics]) -> float:
    """Return the mean over outputs of their noise relative to their energy; 0 of none."""
    return float(np.mean([10 ** (-output.sqnr_db / 10) for output in outputs] or [0.0]))
