"""Errors at the outputs of quantized layers, in the float and the quantized model run side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.gram import NOISE
from magr_onnx.core.layer import ratio
from magr_onnx.core.types import Array
from magr_onnx.model_io.legacy import read
from magr_onnx.passes.emit.readback import iterate_weights
from magr_onnx.passes.graph.kv_cache import current_mask
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.instrument.taps import Extension, shape_taps
from magr_onnx.passes.layers.conv import OPS
from magr_onnx.report.validation import LayerMetrics
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import dimensions_of, kept_rows, masked_values
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.recording import first_of_two
from magr_onnx.runtime.ort.session import Model, Session

BATCHES, SAMPLES = 4, 64  # that layers are measured on, spread over the data: so many batches, or so many samples in more batches
ELEMENTS = 1 << 28  # of all outputs, that more batches may have
IN_CACHE = 1 << 18  # elements of an output that are compared at a time, in float64
BUDGET = 256_000_000  # bytes
SLICE_STEPS = 10  # opset from which Slice has steps


@dataclass(frozen=True, slots=True)
class _Output:
    """A layer's output: its name, its rank, and whether it is an image's, with its channels in axis 1."""

    name: str
    rank: int
    image: bool

    @property
    def axis(self) -> int | None:
        """The axis to sample: rows of an image, positions of a sequence, else samples."""
        return None if self.rank < 2 else -1 if self.image else -2

    def rows(self, y: npt.NDArray[Any], keep: npt.NDArray[np.bool_] | None) -> Array:
        """Return the kept rows ``(n, N)`` of the output in one batch; all for None."""
        y = np.moveaxis(y, 1, -1) if self.image else y
        return y.reshape(-1, y.shape[-1])[slice(None) if keep is None else keep]


@dataclass(slots=True)
class _Sums:
    """Sums over rows of one layer's output ``y (..., N)`` and of its error."""

    rows: float = 0.0
    total: Array | float = 0.0
    power: float = 0.0
    noise: float = 0.0

    def add(self, y: Array, y_hat: Array, weight: float) -> None:
        """Add rows ``(n, N)`` of both models, each counted ``weight`` times, a few at a time."""
        for part in row_parts(y.shape):
            self._add(*without_equal_nonfinite(y[part].astype(np.float64), y_hat[part].astype(np.float64)), weight)

    @np.errstate(all="ignore")  # what is not finite propagates to the error
    def _add(self, y: Array, y_hat: Array, weight: float) -> None:
        self.rows += weight * len(y)
        self.total = self.total + weight * y.sum(axis=0)
        self.power += weight * float(np.square(y).sum())
        self.noise += weight * float(np.square(y - y_hat).sum())

    @property
    def error(self) -> float:
        """Root mean square error over the standard deviation of the output; over its root mean square where it is constant."""
        variance = self.power - float(np.square(self.total).sum()) / max(self.rows, 1e-300)
        if not math.isfinite(self.noise + self.power):
            return math.nan
        return ratio(self.noise, variance if variance > NOISE * self.power else self.power)


def layer_errors(
    float_model: Model,
    quantized_model: Model,
    data: Batches,
    provider: str = "cpu",
    mask: str | None = None,
    budget: int = BUDGET,
    large: bool = False,
) -> tuple[LayerMetrics, ...]:
    """Measure the error at every quantized layer whose output has the same name in both main graphs.

    Large outputs are sampled, so that those of a batch fit into ``budget``: every so many positions of a sequence or an image, or samples.

    Args:
        float_model: The reference.
        quantized_model: The model to compare with it.
        data: Batches; `some` of them are run.
        provider: Where to run both.
        mask: Input whose zero elements mark rows to leave out, where a layer's output has a row for each.
        budget: Bytes that the outputs of all layers may take in a batch, of each model.
        large: Whether one of them is loaded at a time.

    Raises:
        RuntimeFailure: A model does not load or run.
    """
    models = [m if isinstance(m, ir.Model) else read(Path(m)) for m in (float_model, quantized_model)]
    a, b = ({str(value.name): node for node in model.graph for value in node.outputs} for model in models)
    names = [name for name in dict.fromkeys(name for name, _ in iterate_weights(models[1])) if name in a and name in b]
    if not names:
        return ()
    with Session(shape_taps(models[0], names), provider) as session:
        shapes = [tuple(map(int, shape)) for shape in session.run(next(iter(data)))]
    data = some(data, sum(map(math.prod, shapes)))
    outputs = [_Output(name, len(shape), a[name].op_type in OPS) for name, shape in zip(names, shapes, strict=True)]
    step = max(1, math.ceil(4 * sum(map(math.prod, shapes)) / budget))
    if min(model.opset_imports.get("", 1) for model in models) < SLICE_STEPS:
        step = 1
    mask = mask if any(value.name == mask for value in models[0].graph.inputs) else None
    followers = masked_values(models[0], names, CalibrationContext(data, mask, provider))
    sums = [_Sums() for _ in outputs]
    exposed = [_expose(model, outputs, step) for model in models]
    with first_of_two(exposed[0], provider, data, large) as reference, Session(exposed[1], provider) as session:
        for index, batch in enumerate(data):
            counted = None if mask is None else current_mask(batch, mask)[..., ::step]
            pairs = zip(outputs, sums, reference.run(batch, reference.outputs), session.run(batch), strict=True)
            for output, sums_of, y, y_hat in pairs:
                if y.shape == y_hat.shape:
                    keep = kept_rows(counted if output.name in followers else None, y.shape)
                    sums_of.add(output.rows(y, keep), output.rows(y_hat, keep), data.weight(index))
    scopes = [scope_of(a[name]) or scope_of(b[name]) for name in names]
    return tuple(LayerMetrics(name, s.error, scope) for name, s, scope in zip(names, sums, scopes, strict=True) if s.rows)


def some_for(model: ir.Model, data: Batches) -> Batches:
    """Select batches to compare the outputs of ``model`` with another's on."""
    return some(data, output_elements(model, data))


def some(data: Batches, elements: int) -> Batches:
    """Select batches to compare models on: a few, or more where they are small; ``elements`` of outputs are compared in a batch."""
    count = math.ceil(SAMPLES * len(data) / data.samples) if data.samples else 0
    return data.limit(max(BATCHES, min(count, ELEMENTS // max(elements, 1))))


def output_elements(model: ir.Model, data: Batches) -> int:
    """Count the elements of a model's outputs in the first batch; dimensions that are declared neither by size nor as an input's are 1."""
    batch, sizes = next(iter(data)), dict[str | None, int]()
    for name, dimensions in dimensions_of(model).items():
        if name in batch:
            sizes |= {d: size for d, size in zip(dimensions, np.shape(batch[name]), strict=False) if isinstance(d, str)}
    shapes = [v.shape for v in model.graph.outputs if v.shape is not None]
    return sum(math.prod(d if isinstance(d, int) else sizes.get(d.value, 1) for d in shape) for shape in shapes)


def _expose(model: ir.Model, outputs: Sequence[_Output], step: int) -> ir.Model:
    """Copy the model to put out the values of layers as float32, every ``step``-th part of each along its axis."""
    copy = Extension(model)
    start, end, steps = (copy.constant(f"__every_{name}", np.array([i])) for name, i in (("from", 0), ("to", 1 << 62), ("step", step)))
    for i, output in enumerate(outputs):
        value = copy.values[output.name]
        if step > 1 and output.axis is not None:
            axes = copy.constant(f"__every_axis_{i}", np.array([output.axis]))
            value = copy.add("Slice", [value, start, end, axes, steps], f"__every_{i}")
        copy.output(copy.add("Cast", [value], f"__output_{i}", to=ir.DataType.FLOAT), shape=[None] * output.rank)
    return copy.finish()


def row_parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the rows of a matrix into parts of at most `IN_CACHE` elements, or of one row."""
    rows = max(1, IN_CACHE // max(1, shape[1]))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def without_equal_nonfinite(a: Array, b: Array) -> tuple[Array, Array]:
    """Zero both arrays where they have the same NaN or infinity, as behind an attention mask: that is no difference."""
    same = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
    return (np.where(same, 0, a), np.where(same, 0, b)) if same.any() else (a, b)


def squared_distance(a: Array, b: Array) -> float:
    """Sum the squares of a difference, with none where both have the same NaN or infinity; infinity where only one of them has it."""
    a, b = without_equal_nonfinite(a, b)
    with np.errstate(invalid="ignore"):
        total = float(np.square(a - b, dtype=np.float64).sum())
    return total if math.isfinite(total) else math.inf  # NaN would pass for less than anything


def finite_power(y: Array) -> float:
    """Sum the squares of what is finite."""
    return float(np.square(y[np.isfinite(y)], dtype=np.float64).sum())
