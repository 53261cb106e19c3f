"""Choice of activation grids: one pass over the data for histograms, and one for the output error of every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import Histogram, Method, candidates
from magr_onnx.core.distribution_ranges import ChannelSums
from magr_onnx.core.grid_type import GridType
from magr_onnx.core.layer import BiasPolicy, LayerProblem, absorbs_mean
from magr_onnx.core.moments import weighted
from magr_onnx.core.types import Activation, ActivationGrid, Array, DynamicRange
from magr_onnx.errors import NonFiniteError, raise_all
from magr_onnx.passes import Plan
from magr_onnx.passes.instrument.taps import BINS, Tap, bin_edges, error_taps, range_taps
from magr_onnx.passes.layer_passes.activations import ActivationType
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import WeightedNode
from magr_onnx.runtime.calibration.context import CalibrationContext, GridChoice, Grids
from magr_onnx.runtime.calibration.moments import check_rows, make_taps, not_finite, readers_of
from magr_onnx.runtime.data.hold_out import HELD_OUT, NONE, HoldOut
from magr_onnx.runtime.data.sources import Batches, Steps, part_of, run_batches, with_progress
from magr_onnx.runtime.ort.session import Session

FEW_SAMPLES = 256  # up to which ranges are cross-validated
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
    fixed: Mapping[str, ActivationGrid] | None = None,
    progress: Steps | None = None,
) -> dict[str, GridChoice]:
    """Choose the grid of every value, by name.

    Of the candidates of `magr_onnx.core.activation_ranges.candidates`, the one with the least output error ``||(grid(X) - X) A||^2`` on the
    data is chosen, where ``A`` is the value's sketch; the mean error is excluded where biases will absorb it. Of few samples, every part is
    measured under ranges from the others, and ranges wider than the values seen are tried too: fresh samples go beyond them.
    ``method`` says which candidates to try, ``kind`` the type of the codes, and ``fixed`` has values that have a grid already, whose error
    is measured. The model is not changed.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """
    taps = make_taps(model, {v.name: len(v.sketch) for v in values}, context)
    if method == "daq":
        taps = [replace(tap, others=(0,)) for tap in taps]
    hold_out = hold_out_of(context.data)
    parts = histograms_of(model, taps, [v.layers for v in values], context, hold_out, progress=part_of(progress, 0, 2))
    histograms = [reduce(Histogram.plus, of_value) for of_value in zip(*parts, strict=True)]
    bounded = [h.without_sentinels() for h in histograms]
    headroom, known = hold_out.folds > 1 and kind != "dynamic", [(fixed or {}).get(v.name) for v in values]

    def grids_of(measured: Sequence[Histogram]) -> list[dict[str, Activation]]:
        return [
            _grids(h, candidates(h, method, headroom), kind) if grid is None else {"shared": grid}
            for h, grid in zip(measured, known, strict=True)
        ]

    grids = grids_of(bounded)
    trials = [(grids, context.data)]
    if hold_out.folds > 1:  # a range is judged on the part that it was not made from
        trials = []
        for held_out in range(len(parts)):
            rest = [reduce(Histogram.plus, [*of_value[:held_out], *of_value[held_out + 1 :]]) for of_value in zip(*parts, strict=True)]
            measured = [cut if h.low > h.high else h.without_sentinels() for h, cut in zip(rest, bounded, strict=True)]  # no rows elsewhere
            positions = [i for i in range(len(context.data)) if hold_out.part(i) == held_out]
            trials.append((grids_of(measured), context.data.select(positions)))
    clipped = [replace(t, bounds=(min(h.low, 0.0), max(h.high, 0.0))) for t, h in zip(taps, bounded, strict=True)]
    measured = _errors(model, clipped, values, trials, context, part_of(progress, 1, 2))
    result = {}
    for tap, full, cut, named, (by_name, variance, rows) in zip(clipped, histograms, bounded, grids, measured, strict=True):
        unit = _error_of_clipping(by_name, named, cut, rows)
        costs = {name: error + unit * cut.unseen(*named[name].range, rows) for name, error in by_name.items()}
        best = min(costs, key=lambda name: costs[name] * (1 if name == "min-max" else CLIP_GAIN if kind == "dynamic" else 1))
        sentinels, bounds = (None, None) if cut is full else ((full.low, full.high), tap.bounds)
        noise = by_name[best] / variance if variance > 0 else 0.0
        result[tap.value] = GridChoice(named[best], best, by_name, noise, sentinels, bounds)
    return result


def _error_of_clipping(errors: Mapping[str, float], named: _Named, histogram: Histogram, rows: float) -> float:
    """Return the output error by the squared error of values that are clipped, or a little more: the least that any candidate shows.

    Weights may not read the channels that have large values, which then are clipped at no cost, seen or not.
    """
    clipped = {name: histogram.clipped(*named[name].range) for name in errors}
    return min((errors[name] * rows / energy for name, energy in clipped.items() if energy > 0), default=0.0)


def hold_out_of(data: Batches) -> HoldOut:
    """Return the parts of the data that ranges are cross-validated on; none of many samples."""
    return HoldOut(HELD_OUT) if data.samples is not None and data.samples <= FEW_SAMPLES and len(data) > 1 else NONE


def _grids(histogram: Histogram, named: dict[str, tuple[float, float]], kind: ActivationType) -> _Named:
    """Make the candidate grids of a value; a dynamic range needs no bounds where the histogram was not cut."""
    if kind != "dynamic":
        return {name: GridType.named(kind).of_range(*ends) for name, ends in named.items()}
    unbounded = not histogram.cut
    return {name: DynamicRange() if name == "min-max" and unbounded else DynamicRange(*ends) for name, ends in named.items()}


def histograms_of(
    model: ir.Model,
    taps: Sequence[Tap],
    readers: Sequence[Sequence[WeightedNode]],
    context: CalibrationContext,
    hold_out: HoldOut,
    *,
    sample: int | None = None,
    progress: Steps | None = None,
) -> list[list[Histogram]]:
    """Measure the histograms of all taps, for each part of the data; of at most about ``sample`` elements of a value in a batch.

    Raises:
        NonFiniteError: Activations are NaN or infinite; ``readers`` of every tap are named.
    """
    data, shape = context.data, (hold_out.parts, len(taps))
    low, high, counts = np.full(shape, np.inf), np.full(shape, -np.inf), np.zeros((*shape, 2 * BINS))
    channels: list[dict[str, ChannelSums]] = [{} for _ in range(hold_out.parts)]
    bad: dict[str, str] = {}
    for index, weight, results in run_batches(range_taps(model, taps, context.mask, sample), data, context.provider, progress):
        part = hold_out.part(index)
        for i, (tap, least, greatest, histogram) in enumerate(zip(taps, results[::3], results[1::3], results[2::3], strict=False)):
            if least > greatest:  # no rows: the minimum of an empty set is infinite
                continue
            if not (np.isfinite(least) and np.isfinite(greatest)):
                bad.setdefault(tap.value, not_finite(tap.value, readers[i], data.label(index)))
            low[part, i], high[part, i] = min(low[part, i], float(least)), max(high[part, i], float(greatest))
            counts[part, i] += weighted(histogram, weight)
        by_channel = iter(results[3 * len(taps) :])
        for tap in taps:
            if tap.others is not None:
                total, squares, size = (weighted(next(by_channel), weight) for _ in range(3))
                sums = ChannelSums(float(size) / len(total), total, squares)
                channels[part][tap.value] = channels[part][tap.value].plus(sums) if tap.value in channels[part] else sums
    raise_all(NonFiniteError, bad.values())
    edges = bin_edges()
    return [
        [
            Histogram(c[:BINS], c[BINS:], edges, float(a), float(b), channels={t.value: sums[t.value]} if t.value in sums else {})
            for t, c, a, b in zip(taps, *of_part, strict=True)
        ]
        for *of_part, sums in zip(counts, low, high, channels, strict=True)
    ]


def _errors(
    model: ir.Model,
    taps: Sequence[Tap],
    values: Sequence[Value],
    trials: Sequence[tuple[Sequence[dict[str, Activation]], Batches]],
    context: CalibrationContext,
    progress: Steps | None,
) -> list[tuple[dict[str, float], float, float]]:
    """Measure the mean squared output error of every candidate of every tap, each part of the data under grids of its own.

    Also the variance of the output of every tap, and the number of rows.
    """
    sketches, names = [v.sketch for v in values], [list(named) for named in trials[0][0]]
    candidates = [[list(named.values()) for named in grids] for grids, _ in trials]
    tapped = error_taps(model, taps, sketches, candidates[0], context.mask)
    sums = [[np.zeros(shape) for shape in (len(n), (len(n), a.shape[1]), (), a.shape[1], ())] for n, a in zip(names, sketches, strict=True)]
    with Session(tapped.model, context.provider) as session:
        for trial, (grids, (_, data)) in enumerate(zip(candidates, trials, strict=True)):
            feeds = tapped.feeds(grids)
            for index, batch in with_progress(data, part_of(progress, trial, len(trials))):
                results = iter(session.run({**batch, **feeds}))
                for of_tap in sums:
                    *errors_and_power, counts = islice(results, 5)
                    for i, result in enumerate((*errors_and_power, counts[0])):
                        of_tap[i] = of_tap[i] + weighted(result, data.weight(index))
    check_rows([float(of_tap[-1]) for of_tap in sums], context.mask)
    result = []
    for value, named, (energies, totals, power, total, rows) in zip(values, names, sums, strict=True):
        remaining = energies / rows - (np.square(totals / rows).sum(axis=1) if value.centred else 0)
        errors = dict(zip(named, map(float, np.maximum(remaining, 0)), strict=True))
        result.append((errors, float(power / rows - np.square(total / rows).sum()), float(rows)))
    return result


def _sketch(layers: Sequence[LinearLayer]) -> Array:
    """Project the weights of layers ``(K, N)`` to ``(K, r)``, ``r <= SKETCH``; products with it have the same energy in expectation."""
    weights = np.concatenate([layer.read() for layer in layers], axis=1)
    return weights if weights.shape[1] <= SKETCH else np.asarray(weights @ _projection(weights.shape[1]))


def _projection(n: int) -> Array:
    """Draw a random projection ``(n, SKETCH)`` that preserves energy in expectation; the identity for ``n <= SKETCH``."""
    if n <= SKETCH:
        return np.eye(n, dtype=np.float32)
    return np.random.default_rng(0).choice(np.array([-1, 1], np.float32) / np.float32(np.sqrt(SKETCH)), (n, SKETCH))


def choose_grids(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    context: CalibrationContext,
    plan: Plan,
    fixed: Mapping[str, ActivationGrid],
    progress: Steps | None,
) -> Grids:
    """Choose the grids that a plan needs: of layer inputs, and of products if those are quantized too; see `choose`."""
    activations = plan.activations
    if not layers or activations is None:
        return {}
    values = inputs_of(layers, plan.bias_policy)
    input_names = {v.name for v in values}
    values += [v for v in products_of(layers) if v.name not in input_names] if plan.quantizes_outputs else []
    return choose(model, values, context, method=activations.ranges, kind=activations.type, fixed=fixed, progress=progress)


def notes_of(grids: Grids) -> list[str]:
    """Return notes for the report on the values whose range leaves out sentinels."""
    ranges = [(name, *choice.sentinels) for name, choice in grids.items() if choice.sentinels is not None]
    return [f"{name}: values from {low:g} to {high:g} were taken as masks and left out of the range" for name, low, high in ranges]


def with_grids(problem: LayerProblem, layer: LinearLayer, grids: Grids) -> LayerProblem:
    """Add the grids of a layer's input and product to its problem, where there are any."""
    read, product = (grids.get(name) for name in (layer.reads, product_name(layer)))
    output_grid = product.grid if product is not None and isinstance(product.grid, ActivationGrid) else None
    activation, noise = (None, 0.0) if read is None else (read.grid, read.noise)
    return replace(problem, activation=activation, input_noise=noise, output_grid=output_grid)
