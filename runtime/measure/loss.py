"""Loss of a model: the distance of its outputs from the float model's, as one number.

For logits (`magr_onnx.runtime.measure.validate.is_logits`), the mean Kullback-Leibler divergence of their softmax from the float model's,
in nats per row. For a model without logits, 1 minus the mean cosine of the vectors along the last axis, over all float outputs.

Where the float model itself puts out NaN or infinities, as behind a mask, nothing is compared; where only the other model does, the loss is
infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array
from magr_onnx.errors import ModelError
from magr_onnx.passes.graph.kv_cache import current_mask, pairs
from magr_onnx.runtime.calibration.mask import kept_rows, masked_outputs
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.validate import is_logits, log_softmax
from magr_onnx.runtime.ort.session import Batch, Model, Session, as_floats

KL = "KL divergence"
COSINE = "1 - cosine"
MAX_ELEMENTS = 1 << 22  # compared per output and batch; of more, evenly spaced rows are

Run = Callable[[Batch], Sequence[npt.NDArray[Any]]]
_Expected = tuple[int, npt.NDArray[np.intp], Array]  # an output, rows of it, and their log-probabilities or unit vectors (n, V)


class Reference:
    """The float model's outputs on a set of batches, which other models' outputs are compared with."""

    def __init__(self, session: Session, data: Batches, mask: str | None = None) -> None:
        """Run the float model.

        Raises:
            ModelError: The model has no float output.
        """
        self._batches = list(data)
        self._weights = [data.weight(index) for index in range(len(data))]
        results = [[as_floats(y) for y in session.run(batch)] for batch in self._batches]
        cache = set(pairs((i.name for i in session.inputs), session.outputs).values())
        floats = {i: y.ndim for i, y in enumerate(results[0]) if y is not None and session.outputs[i] not in cache}
        if not floats:
            raise ModelError(f"no output has floats ({', '.join(session.outputs)}), so there is no loss to measure")
        logits = [i for i, rank in floats.items() if is_logits(session.outputs[i], rank)]
        self.metric = KL if logits else COSINE
        self._normalize = log_softmax if logits else _unit
        masked = masked_outputs(session, session.outputs, data, mask, [[() if y is None else y.shape for y in ys] for ys in results])
        masks = {i: mask if session.outputs[i] in masked else None for i in floats}
        self._expected = [
            [self._expect(i, y, batch, masks[i]) for i in logits or floats if (y := ys[i]) is not None]
            for ys, batch in zip(results, self._batches, strict=True)
        ]

    def _expect(self, output: int, y: Array, batch: Batch, mask: str | None) -> _Expected:
        y = np.atleast_1d(y)
        keep = None if mask is None else kept_rows(current_mask(batch, mask), y.shape)
        rows = np.arange(y.size // y.shape[-1]) if keep is None else np.flatnonzero(keep)
        limit = max(64, MAX_ELEMENTS // y.shape[-1])
        if len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
        with np.errstate(invalid="ignore"):
            return output, rows, self._normalize(_rows(y, rows))

    def loss(self, run: Run) -> float:
        """Compute the mean loss of the outputs of ``run`` on the batches, over all rows of all outputs compared."""
        total, count = 0.0, 0.0
        for batch, expected, weight in zip(self._batches, self._expected, self._weights, strict=True):
            outputs = run(batch)
            for output, rows, values in expected:
                if (y := as_floats(outputs[output])) is not None:
                    with np.errstate(invalid="ignore"):
                        total += weight * float(self._distances(values, self._normalize(_rows(np.atleast_1d(y), rows))).sum())
                    count += weight * len(rows)
        return np.inf if np.isnan(total) else total / max(count, 1)

    def loss_of(self, model: Model, provider: str) -> float:
        """Compute the mean loss of a model, as `loss` does."""
        with Session(model, provider) as session:
            return self.loss(session.run)

    def _distances(self, expected: Array, actual: Array) -> Array:
        """Compute the loss of every row, ``(n,)``."""
        difference = expected - actual  # half its square is 1 - cosine for unit vectors, without the cancellation
        terms = np.exp(expected) * difference if self.metric == KL else np.square(difference) / 2
        return np.asarray(np.where(np.isfinite(expected), terms, 0).sum(axis=1))


def _rows(y: Array, rows: npt.NDArray[np.intp]) -> Array:
    return np.asarray(y.reshape(-1, y.shape[-1])[rows], np.float64)


def _unit(x: Array) -> Array:
    """Scale rows to length 1, not counting what is not finite in them, which stays as it is."""
    length = np.linalg.norm(np.where(np.isfinite(x), x, 0), axis=1, keepdims=True)
    return np.asarray(x / np.maximum(length, 1e-300))
