"""Choosing static activation grids: a pass over the data for histograms, and one that measures what every candidate does to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import Histogram, Method, candidates
from magr_onnx.core.layer import BiasPolicy, absorbs_mean
from magr_onnx.core.moments import weighted
from magr_onnx.core.types import Activation, ActivationGrid, Array, DynamicRange
from magr_onnx.errors import NonFiniteError, raise_all
from magr_onnx.passes import Plan
from magr_onnx.passes.instrument.taps import BINS, Tap, bin_edges, error_taps, range_taps
from magr_onnx.passes.layer_passes.activations import ActivationType
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.context import CalibrationContext, Progress
from magr_onnx.runtime.calibration.moments import check_rows, make_taps, not_finite, readers_of
from magr_onnx.runtime.ort.session import Session

WORTH_A_NODE = 1.05  # a dynamic range is clipped, which costs a node, where that lowers the error by more than this factor
SKETCH = 64  # columns of the random projection that stands for the weights


@dataclass(frozen=True, slots=True)
class GridChoice:
    """The grid of one value.

    Attributes:
        grid: What to round it to.
        method: Name of the range.
        errors: Mean squared output error of every candidate, by name.
        sentinels: The range seen, where it held values such as -1e9 that were left out; else None.
        bounds: What is left of it without them; else None.
    """

    grid: Activation
    method: str
    errors: dict[str, float]
    sentinels: tuple[float, float] | None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A value that needs a grid.

    Attributes:
        name: Its name in the model.
        layers: The layers it belongs to, for messages.
        sketch: ``(K, r)``: errors are measured behind this matrix.
        centred: Whether biases will absorb the mean error of all that read it.
    """

    name: str
    layers: tuple[LinearLayer, ...]
    sketch: Array
    centred: bool = False


def inputs_of(layers: Sequence[LinearLayer], bias: BiasPolicy | None = None) -> list[Value]:
    """What ``layers`` read, to be judged behind the weights of all layers that read it; ``bias``: of the compensation that follows."""
    values = []
    for name, readers in readers_of(layers).items():
        sketch = _sketch(np.concatenate([x.read() for x in readers], axis=1))
        values.append(Value(name, tuple(readers), sketch, all(absorbs_mean(bias, x.has_bias) for x in readers)))
    return values


def product_name(layer: LinearLayer) -> str:
    """The name of a layer's product: a Gemm's with its bias, a MatMul's without."""
    return str(layer.node.outputs[0].name)


def products_of(layers: Sequence[LinearLayer]) -> list[Value]:
    """What ``layers`` put out, to be judged by itself."""
    return [Value(product_name(layer), (layer,), _projection(layer.n)) for layer in layers]


def choose(
    model: ir.Model,
    values: Sequence[Value],
    context: CalibrationContext,
    *,
    method: Method = "auto",
    kind: ActivationType = "uint8",
    progress: Progress | None = None,
) -> dict[str, GridChoice]:
    """The grid of every value, by name.

    Each candidate of `magr_onnx.core.activation_ranges.candidates` is run over the data, and the one whose error behind the value's
    matrix is least is taken: ``||(grid(X) - X) A||^2``, the mean left out where biases will absorb it.

    Args:
        model: The float model; it is not changed.
        values: Values that need a grid.
        context: Data and how to read it.
        method: Which candidates to try.
        kind: The type of the codes, or ``dynamic``.
        progress: Called with steps done and in total.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """
    taps = make_taps(model, {v.name: len(v.sketch) for v in values}, context)
    histograms = _histograms(model, taps, values, context, _half(progress, 0))
    bounded = [h.without_sentinels() for h in histograms]
    ranges = [candidates(h, method) for h in bounded]
    grids = [_grids(h, named, kind) for h, named in zip(bounded, ranges, strict=True)]
    clipped = [replace(t, bounds=(min(h.low, 0.0), max(h.high, 0.0))) for t, h in zip(taps, bounded, strict=True)]
    errors = _errors(model, clipped, values, grids, context, _half(progress, 1))
    result = {}
    for tap, seen, used, named, measured in zip(clipped, histograms, bounded, grids, errors, strict=True):
        best = min(measured, key=lambda name: measured[name] * (1 if name == "min-max" else WORTH_A_NODE if kind == "dynamic" else 1))
        cut = used is not seen
        result[tap.value] = GridChoice(named[best], best, measured, (seen.low, seen.high) if cut else None, tap.bounds if cut else None)
    return result


def _grids(histogram: Histogram, named: dict[str, tuple[float, float]], kind: ActivationType) -> dict[str, Activation]:
    """What to try on a value. A dynamic range needs no limits where calibration saw nothing to leave out."""
    if kind != "dynamic":
        return {name: ActivationGrid.of_range(*ends, kind == "int8") for name, ends in named.items()}
    free = not histogram.cut
    return {name: DynamicRange() if name == "min-max" and free else DynamicRange(*ends) for name, ends in named.items()}


def _half(progress: Progress | None, part: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, 2 * total)


def _histograms(
    model: ir.Model,
    taps: Sequence[Tap],
    values: Sequence[Value],
    context: CalibrationContext,
    progress: Progress | None,
) -> list[Histogram]:
    low, high = np.full(len(taps), np.inf), np.full(len(taps), -np.inf)
    counts = np.zeros((len(taps), 2 * BINS))
    bad: dict[str, str] = {}
    data = context.data
    with Session(range_taps(model, taps, context.mask), context.provider) as session:
        for index, batch in enumerate(data):
            results = iter(session.run(batch))
            for i, tap in enumerate(taps):
                least, greatest, histogram = next(results), next(results), next(results)
                if least > greatest:  # no rows: the least of nothing is infinite
                    continue
                if not (np.isfinite(least) and np.isfinite(greatest)):
                    bad.setdefault(tap.value, not_finite(tap.value, values[i].layers, data.label(index)))
                low[i], high[i] = min(low[i], float(least)), max(high[i], float(greatest))
                counts[i] += weighted(histogram, data.weight(index))
            if progress is not None:
                progress(index + 1, len(data))
    raise_all(NonFiniteError, bad.values())
    return [Histogram(c[:BINS], c[BINS:], bin_edges(), float(a), float(b)) for c, a, b in zip(counts, low, high, strict=True)]


def _errors(
    model: ir.Model,
    taps: Sequence[Tap],
    values: Sequence[Value],
    grids: Sequence[dict[str, Activation]],
    context: CalibrationContext,
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Mean squared output error of every grid of every tap."""
    sketches = [v.sketch for v in values]
    energy = [np.zeros(len(g)) for g in grids]
    sums = [np.zeros((len(g), a.shape[1])) for g, a in zip(grids, sketches, strict=True)]
    rows = [0.0] * len(taps)
    tapped = error_taps(model, taps, sketches, [list(g.values()) for g in grids], context.mask)
    with Session(tapped, context.provider) as session:
        for index, batch in enumerate(context.data):
            results, weight = iter(session.run(batch)), context.data.weight(index)
            for i in range(len(taps)):
                for j in range(len(grids[i])):
                    energy[i][j] += float(next(results)) * weight
                    sums[i][j] += weighted(next(results), weight)
                rows[i] += float(next(results)[0]) * weight
            if progress is not None:
                progress(index + 1, len(context.data))
    check_rows(rows, context.mask)
    errors = []
    for value, named, e, s, r in zip(values, grids, energy, sums, rows, strict=True):
        remaining = e / r - (np.square(s / r).sum(axis=1) if value.centred else 0)
        errors.append(dict(zip(named, map(float, np.maximum(remaining, 0)), strict=True)))
    return errors


def _sketch(weights: Array) -> Array:
    """``(K, r)`` whose product with errors has the energy that ``weights (K, N)`` give them, in expectation (`SKETCH` columns at most)."""
    result: Array = weights if weights.shape[1] <= SKETCH else weights @ _projection(weights.shape[1])
    return result


def _projection(n: int) -> Array:
    """``(n, r)`` that keeps energies in expectation, the identity up to `SKETCH` columns."""
    if n <= SKETCH:
        return np.eye(n, dtype=np.float32)
    return np.random.default_rng(0).choice(np.array([-1, 1], np.float32) / np.float32(np.sqrt(SKETCH)), (n, SKETCH))


@dataclass(frozen=True, slots=True)
class Grids:
    """How activations are quantized, by value name.

    Attributes:
        inputs: Of what layers read.
        products: Of what layers put out, where that is quantized too.
        bounds: What values are clipped to in statistics, where sentinels were found.
        notes: Sentences for the report.
    """

    inputs: dict[str, Activation] = field(default_factory=dict)
    products: dict[str, ActivationGrid] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_grids(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    context: CalibrationContext,
    plan: Plan,
    progress: Progress | None,
) -> Grids:
    """The grids that a plan asks for, of layers' inputs and of their products where those are quantized too; see `choose`."""
    activations = plan.activations
    if not layers or activations is None:
        return Grids()
    values = inputs_of(layers, plan.bias_policy)
    products = products_of(layers) if plan.quantizes_outputs else []
    read = {v.name for v in values}
    values += [v for v in products if v.name not in read]
    chosen = choose(model, values, context, method=activations.ranges, kind=activations.type, progress=progress)
    grids = Grids({name: choice.grid for name, choice in chosen.items()})
    for value in products:
        grid = chosen[value.name].grid
        if isinstance(grid, ActivationGrid):
            grids.products[value.name] = grid
    for name, choice in chosen.items():
        if choice.bounds is not None:
            grids.bounds[name] = choice.bounds
        if choice.sentinels is not None:
            low, high = choice.sentinels
            grids.notes.append(f"{name}: values from {low:g} to {high:g} were taken as masks and left out of the range")
    return grids
