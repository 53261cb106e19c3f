"""How far a model's outputs are from the float model's, as one number.

For outputs that hold logits (`magr_onnx.runtime.measure.validate.is_logits`): the mean Kullback-Leibler divergence of their softmax from
that of
the float model, in nats a row. For a model without such outputs: 1 minus the mean cosine of the vectors along the last axis, over all float
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array
from magr_onnx.errors import ModelError
from magr_onnx.passes.graph.kv_cache import current_mask, pairs
from magr_onnx.runtime.calibration.mask import kept_rows, masked_outputs
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.validate import is_logits, log_softmax
from magr_onnx.runtime.ort.session import Batch, Session

KL = "KL divergence"
COSINE = "1 - cosine"
ELEMENTS = 1 << 22  # of an output and batch that are compared; further rows are left out evenly

Run = Callable[[Batch], Sequence[npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class _Expected:
    """Rows of one output of one batch: which, and the float model's (log-probabilities, or vectors of length 1), ``(n, V)``."""

    output: int
    rows: npt.NDArray[np.intp]
    values: Array


class Reference:
    """The float model's outputs on some batches, kept to compare others with."""

    def __init__(self, session: Session, data: Batches, mask: str | None = None) -> None:
        """Run the float model.

        Raises:
            ModelError: The model has no output of floats.
        """
        self._batches = list(data)
        self._weights = [data.weight(index) for index in range(len(data))]
        results = [session.run(batch) for batch in self._batches]
        cache = set(pairs((i.name for i in session.inputs), session.outputs).values())
        floats = [
            i for i, y in enumerate(results[0]) if np.issubdtype(np.asarray(y).dtype, np.floating) and session.outputs[i] not in cache
        ]
        if not floats:
            raise ModelError(f"no output is of floats ({', '.join(session.outputs)}), so there is no loss to measure")
        logits = [i for i in floats if is_logits(session.outputs[i], results[0][i].ndim)]
        self.metric = KL if logits else COSINE
        self._normal = log_softmax if logits else _unit
        masked = masked_outputs(session, session.outputs, data, mask)
        masks = {i: mask if session.outputs[i] in masked else None for i in floats}
        self._expected = [
            [self._keep(i, y[i], batch, masks[i]) for i in logits or floats] for y, batch in zip(results, self._batches, strict=True)
        ]

    def _keep(self, output: int, y: Array, batch: Batch, mask: str | None) -> _Expected:
        y = np.atleast_1d(y)
        keep = None if mask is None else kept_rows(current_mask(batch, mask), y.shape)
        rows = np.arange(y.size // y.shape[-1]) if keep is None else np.flatnonzero(keep)
        most = max(64, ELEMENTS // y.shape[-1])
        if len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        return _Expected(output, rows, self._normal(_rows(y, rows)))

    def loss(self, run: Run) -> float:
        """The mean loss of what ``run`` computes on the batches, over all rows of all outputs compared."""
        total, count = 0.0, 0.0
        for batch, expected, weight in zip(self._batches, self._expected, self._weights, strict=True):
            y = run(batch)
            for e in expected:
                total += weight * float(self._distances(e.values, self._normal(_rows(np.atleast_1d(y[e.output]), e.rows))).sum())
                count += weight * len(e.rows)
        return total / max(count, 1)

    def _distances(self, expected: Array, found: Array) -> Array:
        """Loss of every row, ``(n,)``."""
        if self.metric == KL:
            result: Array = (np.exp(expected) * (expected - found)).sum(axis=1)
        else:
            result = np.square(expected - found).sum(axis=1) / 2  # of unit vectors this is 1 - cosine, without its cancellation
        return result


def _rows(y: Array, rows: npt.NDArray[np.intp]) -> Array:
    result: Array = y.reshape(-1, y.shape[-1])[rows].astype(np.float64)
    return result


def _unit(x: Array) -> Array:
    result: Array = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    return result
