"""Choice of activation grids: one pass over the data for histograms, and one for the output error of every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import Histogram, Method, candidates
from magr_onnx.core.layer import BiasPolicy, LayerProblem, absorbs_mean
from magr_onnx.core.moments import weighted
from magr_onnx.core.types import Activation, ActivationGrid, Array, DynamicRange
from magr_onnx.errors import NonFiniteError, raise_all
from magr_onnx.passes import Plan
from magr_onnx.passes.instrument.taps import BINS, Tap, bin_edges, error_taps, range_taps
from magr_onnx.passes.layer_passes.activations import ActivationType
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.context import CalibrationContext, GridChoice, Grids
from magr_onnx.runtime.calibration.moments import check_rows, make_taps, not_finite, readers_of
from magr_onnx.runtime.data.sources import Steps, part_of, run_batches

CLIP_GAIN = 1.05  # a dynamic range is clipped, which costs a node, if that lowers the error by more than this factor
SKETCH = 64  # columns of the random projection of the weights
_Named = dict[str, Activation]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A value that needs a grid.

    Attributes:
        name: Its name in the model.
        layers: The layers it belongs to, for messages.
        sketch: Matrix ``(K, r)`` that errors are multiplied by.
        centred: Whether biases will absorb the mean error in all layers that read it.
    """

    name: str
    layers: tuple[LinearLayer, ...]
    sketch: Array
    centred: bool = False


def inputs_of(layers: Sequence[LinearLayer], bias: BiasPolicy | None = None) -> list[Value]:
    """List the inputs of layers, whose errors are measured behind the weights of all their readers; ``bias`` is the later correction's."""
    return [
        Value(name, tuple(readers), _sketch(readers), all(absorbs_mean(bias, x.has_bias) for x in readers))
        for name, readers in readers_of(layers).items()
    ]


def product_name(layer: LinearLayer) -> str:
    """Return the name of a layer's product, with the bias of a Gemm and without that of a MatMul."""
    return str(layer.node.outputs[0].name)


def products_of(layers: Sequence[LinearLayer]) -> list[Value]:
    """List the products of layers, whose errors are measured directly."""
    return [Value(product_name(layer), (layer,), _projection(layer.n)) for layer in layers]


def choose(
    model: ir.Model,
    values: Sequence[Value],
    context: CalibrationContext,
    *,
    method: Method = "auto",
    kind: ActivationType = "uint8",
    progress: Steps | None = None,
) -> dict[str, GridChoice]:
    """Choose the grid of every value, by name.

    Of the candidates of `magr_onnx.core.activation_ranges.candidates`, the one with the least output error ``||(grid(X) - X) A||^2`` on the
    data is chosen, where ``A`` is the value's sketch; the mean error is excluded where biases will absorb it. ``method`` says which
    candidates to try, and ``kind`` the type of the codes. The model is not changed.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """
    taps = make_taps(model, {v.name: len(v.sketch) for v in values}, context)
    histograms = _histograms(model, taps, values, context, part_of(progress, 0, 2))
    bounded = [h.without_sentinels() for h in histograms]
    ranges = [candidates(h, method) for h in bounded]
    grids = [_grids(h, named, kind) for h, named in zip(bounded, ranges, strict=True)]
    clipped = [replace(t, bounds=(min(h.low, 0.0), max(h.high, 0.0))) for t, h in zip(taps, bounded, strict=True)]
    errors = _errors(model, clipped, values, grids, context, part_of(progress, 1, 2))
    result = {}
    for tap, full, cut, named, by_name in zip(clipped, histograms, bounded, grids, errors, strict=True):
        best = min(by_name, key=lambda name: by_name[name] * (1 if name == "min-max" else CLIP_GAIN if kind == "dynamic" else 1))
        sentinels, bounds = (None, None) if cut is full else ((full.low, full.high), tap.bounds)
        result[tap.value] = GridChoice(named[best], best, by_name, sentinels, bounds)
    return result


def _grids(histogram: Histogram, named: dict[str, tuple[float, float]], kind: ActivationType) -> _Named:
    """Make the candidate grids of a value; a dynamic range needs no bounds where the histogram was not cut."""
    if kind != "dynamic":
        return {name: ActivationGrid.of_range(*ends, kind == "int8") for name, ends in named.items()}
    unbounded = not histogram.cut
    return {name: DynamicRange() if name == "min-max" and unbounded else DynamicRange(*ends) for name, ends in named.items()}


def _histograms(
    model: ir.Model, taps: Sequence[Tap], values: Sequence[Value], context: CalibrationContext, progress: Steps | None
) -> list[Histogram]:
    low, high = np.full(len(taps), np.inf), np.full(len(taps), -np.inf)
    counts = np.zeros((len(taps), 2 * BINS))
    bad: dict[str, str] = {}
    data = context.data
    for index, weight, results in run_batches(range_taps(model, taps, context.mask), data, context.provider, progress):
        for i, (tap, least, greatest, histogram) in enumerate(zip(taps, results[::3], results[1::3], results[2::3], strict=True)):
            if least > greatest:  # no rows: the minimum of an empty set is infinite
                continue
            if not (np.isfinite(least) and np.isfinite(greatest)):
                bad.setdefault(tap.value, not_finite(tap.value, values[i].layers, data.label(index)))
            low[i], high[i] = min(low[i], float(least)), max(high[i], float(greatest))
            counts[i] += weighted(histogram, weight)
    raise_all(NonFiniteError, bad.values())
    return [Histogram(c[:BINS], c[BINS:], bin_edges(), float(a), float(b)) for c, a, b in zip(counts, low, high, strict=True)]


def _errors(
    model: ir.Model,
    taps: Sequence[Tap],
    values: Sequence[Value],
    grids: Sequence[_Named],
    context: CalibrationContext,
    progress: Steps | None,
) -> list[dict[str, float]]:
    """Measure the mean squared output error of every grid of every tap."""
    sketches = [v.sketch for v in values]
    energy = [np.zeros(len(g)) for g in grids]
    sums = [np.zeros((len(g), a.shape[1])) for g, a in zip(grids, sketches, strict=True)]
    rows = [0.0] * len(taps)
    tapped = error_taps(model, taps, sketches, [list(g.values()) for g in grids], context.mask)
    for _, weight, outputs in run_batches(tapped, context.data, context.provider, progress):
        results = iter(outputs)
        for i in range(len(taps)):
            for j in range(len(grids[i])):
                energy[i][j] += float(next(results)) * weight
                sums[i][j] += weighted(next(results), weight)
            rows[i] += float(next(results)[0]) * weight
    check_rows(rows, context.mask)
    errors = []
    for value, named, e, s, r in zip(values, grids, energy, sums, rows, strict=True):
        remaining = e / r - (np.square(s / r).sum(axis=1) if value.centred else 0)
        errors.append(dict(zip(named, map(float, np.maximum(remaining, 0)), strict=True)))
    return errors


def _sketch(layers: Sequence[LinearLayer]) -> Array:
    """Project the weights of layers ``(K, N)`` to ``(K, r)``, ``r <= SKETCH``; products with it have the same energy in expectation."""
    weights = np.concatenate([layer.read() for layer in layers], axis=1)
    return weights if weights.shape[1] <= SKETCH else np.asarray(weights @ _projection(weights.shape[1]))


def _projection(n: int) -> Array:
    """Draw a random projection ``(n, SKETCH)`` that preserves energy in expectation; the identity for ``n <= SKETCH``."""
    if n <= SKETCH:
        return np.eye(n, dtype=np.float32)
    return np.random.default_rng(0).choice(np.array([-1, 1], np.float32) / np.float32(np.sqrt(SKETCH)), (n, SKETCH))


def choose_grids(model: ir.Model, layers: Sequence[LinearLayer], context: CalibrationContext, plan: Plan, progress: Steps | None) -> Grids:
    """Choose the grids that a plan needs: of layer inputs, and of products if those are quantized too; see `choose`."""
    activations = plan.activations
    if not layers or activations is None:
        return {}
    values = inputs_of(layers, plan.bias_policy)
    input_names = {v.name for v in values}
    values += [v for v in products_of(layers) if v.name not in input_names] if plan.quantizes_outputs else []
    return choose(model, values, context, method=activations.ranges, kind=activations.type, progress=progress)


def notes_of(grids: Grids) -> list[str]:
    """Return notes for the report on the values whose range leaves out sentinels."""
    ranges = [(name, *choice.sentinels) for name, choice in grids.items() if choice.sentinels is not None]
    return [f"{name}: values from {low:g} to {high:g} were taken as masks and left out of the range" for name, low, high in ranges]


def with_grids(problem: LayerProblem, layer: LinearLayer, grids: Grids) -> LayerProblem:
    """Add the grids of a layer's input and product to its problem, where there are any."""
    activation, product = (None if name not in grids else grids[name].grid for name in (layer.reads, product_name(layer)))
    return replace(problem, activation=activation, output_grid=product if isinstance(product, ActivationGrid) else None)
