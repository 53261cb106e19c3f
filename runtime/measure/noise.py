"""The noise of quantized models at their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.validate import compare_outputs
from magr_onnx.runtime.ort.session import Session

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
    with contextlib.ExitStack() as stack:
        exact, *sessions = (stack.enter_context(Session(model, provider)) for model in (reference, *candidates))
        return of_sessions(exact, sessions, data, mask)


def of_sessions(reference: Session, sessions: Sequence[Session], data: Batches, mask: str | None) -> Array:
    """Measure `noises` of models that are loaded."""
    outputs, _ = compare_outputs(reference, {str(i): s for i, s in enumerate(sessions)}, data, mask, losses=False)
    return np.array([np.mean([10 ** (-m.sqnr_db / 10) for m in metrics] or [0.0]) for metrics in outputs.values()])
