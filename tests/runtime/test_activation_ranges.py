"""Activation ranges: the histogram and the errors measured inside the graph against NumPy, and what is chosen from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.core.activation_ranges import METHODS, Histogram, candidates, grid_near_levels
from magr_onnx.core.types import Activation, ActivationGrid, DynamicRange
from magr_onnx.errors import CalibrationError, NonFiniteError
from magr_onnx.passes import find
from magr_onnx.passes.instrument.taps import BINS, Tap, bin_edges, error_taps, range_taps
from magr_onnx.runtime.calibration import activation_ranges
from magr_onnx.runtime.calibration.context import CalibrationContext, GridChoice
from magr_onnx.runtime.calibration.moments import collect
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Builder, K, feeds, random
from tests.helpers import EXAMPLES, Array

EDGES = bin_edges()


def data_of(model: ir.Model, batches: Sequence[dict[str, Array]]) -> Batches:
    with Session(model) as session:
        return open_data(batches, session.inputs)


def wide(*shape: int, seed: int = 0) -> Array:
    """Values of either sign over all magnitudes float32 has, zeros among them."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 1], shape) * 10 ** rng.uniform(-12, 15, shape)
    values[rng.random(shape) < 0.1] = 0
    return values.astype(np.float32)


def histogram_of(values: Array) -> Histogram:
    """The same by NumPy: magnitudes outside the bins count in the first and the last."""
    magnitude = np.clip(np.abs(values.astype(np.float64)), EDGES[0], EDGES[-1])
    negative, positive = (np.histogram(magnitude[side], EDGES)[0].astype(float) for side in (values <= 0, values > 0))
    return Histogram(negative, positive, EDGES, float(values.min()), float(values.max()))


def check_histogram(found: Sequence[Array], values: Array) -> None:
    """Counts by bin, but for values so near an edge that a float32 logarithm may put them on its other side."""
    low, high, counts = found
    assert (float(low), float(high)) == (values.min(), values.max())
    expected = histogram_of(values)
    assert counts.shape == (2 * BINS,)
    assert counts.sum() == values.size
    inside = np.abs(values[(np.abs(values) > EDGES[0]) & (np.abs(values) < EDGES[-1])].astype(np.float64))
    place = np.log2(inside) * 8
    near = int((np.abs(place - np.rint(place)) < 2e-3).sum())
    assert near < 0.02 * values.size + 2
    assert np.abs(counts - np.concatenate([expected.negative, expected.positive])).sum() <= 2 * near


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
def test_histogram_in_the_graph_is_numpy_s(opset: int) -> None:
    model = graphs.matmul(opset=opset)
    x = wide(6, 50, K)
    with Session(range_taps(model, [Tap("x", K)])) as session:
        check_histogram(session.run({"x": x}), x)


def test_histogram_of_half_precision() -> None:
    model = graphs.matmul(dtype=np.float16)
    x = (np.random.default_rng(0).standard_normal((6, 5, K)) * 3).astype(np.float16)
    with Session(range_taps(model, [Tap("x", K)])) as session:
        check_histogram(session.run({"x": x}), x.astype(np.float32))


def test_rows_left_out_by_a_mask_are_zeros() -> None:
    model = graphs.masked()
    x = feeds(model, rows=9, time=5)
    x["x"][x["attention_mask"] == 0] = 1e6
    kept = x["x"] * x["attention_mask"][..., None].astype(np.float32)
    with Session(range_taps(model, [Tap("x", K, masked=True)], "attention_mask")) as session:
        check_histogram(session.run(x), kept)


def test_magnitudes_beyond_the_bins_are_in_the_last_ones() -> None:
    x = np.full((1, 1, K), 3.4e38, np.float32)
    x[..., :10], x[..., 10:13], x[..., 13] = -1e-30, -3.4e38, 0
    with Session(range_taps(graphs.matmul(), [Tap("x", K)])) as session:
        low, high, counts = session.run({"x": x})
    assert (float(low), float(high)) == (float(np.float32(-3.4e38)), float(np.float32(3.4e38)))
    assert (counts[0], counts[BINS - 1], counts[-1], counts.sum()) == (11, 3, K - 14, K)


def logarithm() -> ir.Model:
    """Two layers behind a logarithm: NaN where the input is negative, infinite where it is zero."""
    b = Builder()
    x = b.input("x", ["batch", "time", K])
    real = b.node("Log", [x], "log")
    first = b.node("MatMul", [real, b.constant("w1", random(K, 8))], "first")
    second = b.node("MatMul", [real, b.constant("w2", random(K, 8, seed=1))], "second")
    return b.model(b.node("Add", [first, second], "sum"), ["batch", "time", 8])


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 20), (3, 4, K - 1)])
@pytest.mark.parametrize("bad", [-1.0, 0.0])
@pytest.mark.parametrize("form", ["qdq-int8", "dynamic-int8"])
def test_activations_that_are_not_finite_name_the_layers(place: tuple[int, ...], bad: float, form: Any) -> None:
    good, x = (np.random.default_rng(s).uniform(1, 2, (4, 5, K)).astype(np.float32) for s in (0, 1))
    x[place] = bad
    with pytest.raises(NonFiniteError, match=r"input of first, second \(log_out\): NaN or infinite activations in .*batch 1"):
        magr_onnx.optimize(logarithm(), [{"x": good}, {"x": x}], format=form)


def test_a_mask_that_leaves_nothing_is_an_error() -> None:
    model = graphs.masked()
    x = feeds(model)
    x["attention_mask"][:] = 0
    with pytest.raises(CalibrationError, match="leaves no rows"):
        activation_ranges.choose(
            model, activation_ranges.inputs_of(find(model)[0]), CalibrationContext(data_of(model, [x]), "attention_mask")
        )


# Candidates from a histogram


@EXAMPLES
@given(st.integers(0, 99), st.integers(1, 400), st.sampled_from([0.0, 0.001, 0.01, 0.2]), st.sampled_from(["normal", "positive", "heavy"]))
def test_quantiles_leave_out_no_more_than_they_may(seed: int, size: int, fraction: float, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = {"normal": rng.standard_normal(size), "positive": rng.exponential(size=size), "heavy": rng.standard_t(1, size)}[kind]
    x = x.astype(np.float32)
    low, high = histogram_of(x).quantile(fraction)
    assert x.min() <= low
    assert high <= x.max()
    ratio = 2 ** (1 / 8) * (1 + 1e-6)
    for bound, side in ((high, x), (-low, -x)):
        assert (side > bound + 1e-6 * abs(bound)).sum() <= fraction * size
        if bound > EDGES[1] and bound < side.max():  # a bin less would leave out too much
            assert (side >= bound / ratio).sum() > fraction * size


def test_candidates_hold_zero_and_lie_inside_what_was_seen() -> None:
    for values in (np.array([2.0, 3.0]), np.array([-5.0, -1.0]), random(500), np.zeros(3)):
        seen = histogram_of(values)
        found = candidates(seen)
        assert len(found) == 1 + 3 + 5
        assert found["min-max"] == (min(seen.low, 0), max(seen.high, 0))
        for low, high in found.values():
            assert found["min-max"][0] <= low <= 0 <= high <= found["min-max"][1]
        for method in METHODS[1:]:
            alone = candidates(seen, method)  # type: ignore[arg-type]
            assert method == "daq" or alone.items() <= found.items()
            assert all(found["min-max"][0] <= low <= 0 <= high <= found["min-max"][1] for low, high in alone.values())


def test_least_error_clips_what_is_rare() -> None:
    x = np.concatenate([random(100_000, scale=1.0), [60.0, -40.0]])
    low, high = histogram_of(x).least_error()
    grids = [ActivationGrid.of_range(*ends) for ends in ((low, high), (-40.0, 60.0))]
    chosen, plain = (float(np.square(rounded(x.astype(np.float32), g) - x).sum()) for g in grids)
    assert chosen < 0.85 * plain
    assert histogram_of(x).errors(np.array([low]), np.array([high]))[0] == pytest.approx(chosen, rel=0.1)


@pytest.mark.parametrize("clipping", [1.0, 16.0])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.5])
def test_least_error_is_that_of_all_ranges_bin_by_bin(shift: float, clipping: float) -> None:
    """For ends from 5 to 100 % of the extremes, in even ratios; the magnitude of a bin is the geometric mean of its edges."""
    x = np.random.default_rng(3).standard_t(3, 3000) + shift
    histogram = histogram_of(x)

    def error(low: float, high: float) -> float:
        total = 0.0
        for sign, counts, bound, extreme in ((1, histogram.positive, high, x.max()), (-1, histogram.negative, -low, x.min())):
            for i in np.flatnonzero(counts):
                centre = (EDGES[i] * EDGES[i + 1]) ** 0.5
                value = min(centre, max(sign * extreme, 0))
                total += counts[i] * (clipping * (value - bound) ** 2 if value > bound else min(((high - low) / 255) ** 2 / 12, centre**2))
        return total

    ends = 20.0 ** (np.arange(-15, 1) / 15)
    low, high = histogram.least_error(clipping)
    assert error(low, high) == pytest.approx(min(error(a * x.min(), b * x.max()) for a in ends for b in ends), rel=1e-12)
    assert histogram.errors(np.array([low]), np.array([high]), clipping)[0] == pytest.approx(error(low, high), rel=1e-12)


@pytest.mark.parametrize("sentinel", [-1e9, -1e30, -3.4e38, 1e9])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_sentinels_are_told_from_signal(sentinel: float, scale: float) -> None:
    x = random(1000, scale=scale)
    x[x < -scale] = 0
    cut = histogram_of(np.append(x, np.float32(sentinel))).without_sentinels()
    plain = histogram_of(x)
    assert cut.cut
    assert x.min() * 1.1 <= cut.low <= x.min()  # within a bin
    assert x.max() <= cut.high <= x.max() * 1.1
    np.testing.assert_array_equal(cut.negative, plain.negative)
    np.testing.assert_array_equal(cut.positive, plain.positive)


def test_signal_is_no_sentinel() -> None:
    sparse = np.array([0, 1e6, 0, 3e6])  # zeros say nothing about the scale of the rest
    for x in (random(1000), np.append(random(1000), 5e3), 10 ** np.linspace(-6, 9, 400), np.zeros(5), np.full(3, -1e9), sparse):
        seen = histogram_of(x)
        assert seen.without_sentinels() is seen


# Errors measured in the graph


def rounded(x: Array, grid: Activation) -> Array:
    """QuantizeLinear and DequantizeLinear, or DynamicQuantizeLinear, in float32 as they are specified."""
    if isinstance(grid, ActivationGrid):
        codes = np.clip(np.rint(x / np.float32(grid.scale)) + grid.zero_point, *grid.limits)
        return (codes - grid.zero_point).astype(np.float32) * np.float32(grid.scale)
    x = np.clip(x, np.float32(grid.low), np.float32(grid.high))
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero).astype(np.float32) * scale


GRIDS: list[list[Activation]] = [  # of one type
    [ActivationGrid.of_range(-30, 50), ActivationGrid.of_range(-3, 2)],
    [
        ActivationGrid.of_range(-30, 50, signed=True),
        ActivationGrid.of_range(-3, 2, signed=True),
        ActivationGrid.of_range(0, 1, signed=True),
    ],
    [ActivationGrid.of_range(-30, 50, bits=16), ActivationGrid.of_range(-3, 2, bits=16)],
    [DynamicRange(), DynamicRange(-4, 9)],
    [DynamicRange()],
]


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("bounds", [None, (-20.0, 6.0)])
@pytest.mark.parametrize("grids", GRIDS)
def test_errors_in_the_graph_are_numpy_s(opset: int, bounds: tuple[float, float] | None, grids: list[Activation]) -> None:
    model = graphs.matmul(opset=opset)
    x = feeds(model)
    sketch = random(K, 7, seed=5)
    tapped = error_taps(model, [Tap("x", K, bounds=bounds)], [sketch], [grids])
    clipped = x["x"] if bounds is None else np.clip(x["x"], *np.float32(bounds))
    with Session(tapped.model) as session:
        for order in (grids, grids[::-1]):  # grids are inputs
            energies, totals, power, total, rows = session.run(x | tapped.feeds([order]))
            assert rows[0] == x["x"].size / K
            products = [(rounded(clipped, grid) - clipped).reshape(-1, K).astype(np.float64) @ sketch for grid in order]
            products.append(clipped.reshape(-1, K).astype(np.float64) @ sketch)
            for product, energy, sums in zip(products, [*energies, power], [*totals, total], strict=True):
                assert energy == pytest.approx(np.square(product).sum(), rel=1e-4)
                np.testing.assert_allclose(sums, product.sum(axis=0), rtol=1e-3, atol=1e-3 * np.abs(product).sum(axis=0).max())


@pytest.mark.parametrize("grids", GRIDS)
def test_errors_count_the_rows_of_the_mask(grids: list[Activation]) -> None:
    model = graphs.masked()
    x = feeds(model, rows=7, time=4)
    sketch = random(K, 7, seed=5)
    tapped = error_taps(model, [Tap("x", K, masked=True)], [sketch], [grids], "attention_mask")
    with Session(tapped.model) as session:
        energies, _, _, _, rows = session.run(x | tapped.feeds([grids]))
    kept = x["attention_mask"] != 0
    assert rows[0] == kept.sum()
    for energy, grid in zip(energies, grids, strict=True):  # a dynamic range is that of all rows
        error = (rounded(x["x"], grid) - x["x"])[kept].astype(np.float64) @ sketch
        assert energy == pytest.approx(np.square(error).sum(), rel=1e-4)


def skewed(seed: int, kind: str) -> Array:
    """Inputs on which methods differ: a few outliers, heavy tails, one sign only."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((16, 8, K))
    if kind == "outliers":
        x[rng.random(x.shape) < 1e-3] *= 30
    elif kind == "heavy":
        x = rng.standard_t(2, x.shape)
    else:
        x = np.maximum(x, 0) ** 2
    return x.astype(np.float32)


def error_of(x: Array, grid: Activation, weight: Array, centred: bool = False) -> float:
    """Mean squared output error behind the weight; ``centred`` without its mean."""
    error = (rounded(x, grid) - x).reshape(-1, K).astype(np.float64) @ weight
    return float(np.square(error - (error.mean(axis=0) if centred else 0)).sum(axis=1).mean())


@pytest.mark.parametrize("distribution", ["outliers", "heavy", "positive"])
@pytest.mark.parametrize("kind", ["uint8", "int8", "dynamic"])
@pytest.mark.parametrize("centred", [False, True])
def test_auto_is_never_worse_than_any_method(distribution: str, kind: Any, centred: bool) -> None:
    model = graphs.matmul_bias()
    (layer,) = find(model)[0]
    x = skewed(1, distribution)
    data = data_of(model, [{"x": x}])
    values = activation_ranges.inputs_of([layer], "existing" if centred else "none")
    found = {m: activation_ranges.choose(model, values, CalibrationContext(data), method=m, kind=kind)["x"] for m in METHODS}  # type: ignore[arg-type]
    measured = {m: error_of(x, choice.grid, layer.read(), centred) for m, choice in found.items()}
    spare = 1.05 if kind == "dynamic" else 1.0  # a Clip is written only where it is worth a node
    assert measured["auto"] <= min(measured.values()) * spare * (1 + 1e-3)
    for method, choice in found.items():
        assert choice.errors[choice.method] == pytest.approx(measured[method], rel=1e-3)
        assert choice.sentinels is choice.bounds is None


@pytest.mark.parametrize("kind", ["uint8", "int8", "dynamic"])
def test_outliers_that_no_weight_reads_are_clipped(kind: Any) -> None:
    b = Builder()
    weight = random(K, 8)
    weight[0] = 0
    model = b.model(b.node("MatMul", [b.input("x", ["batch", K]), b.constant("w", weight)], "layer"), ["batch", 8])
    x = random(500, K)
    x[3, 0] = 300
    auto, plain = (
        activation_ranges.choose(
            model, activation_ranges.inputs_of(find(model)[0]), CalibrationContext(data_of(model, [{"x": x}])), method=m, kind=kind
        )["x"]
        for m in ("auto", "min-max")
    )
    assert error_of(x, auto.grid, weight) < 0.01 * error_of(x, plain.grid, weight)


def test_a_wide_layer_is_judged_by_a_projection_of_its_weights() -> None:
    model = graphs.matmul(K, 400)
    (layer,) = find(model)[0]
    (value,) = activation_ranges.inputs_of([layer])
    assert value.sketch.shape == (K, activation_ranges.SKETCH)
    x = skewed(0, "heavy")
    choice = activation_ranges.choose(model, [value], CalibrationContext(data_of(model, [{"x": x}])))["x"]
    exact = {name: error_of(x, ActivationGrid.of_range(*ends), layer.read()) for name, ends in candidates(histogram_of(x)).items()}
    assert exact[choice.method] <= 1.05 * min(exact.values())
    assert choice.errors["min-max"] == pytest.approx(exact["min-max"], rel=0.3)


def test_layers_that_read_one_value_are_judged_together() -> None:
    model = graphs.masked()
    values = activation_ranges.inputs_of(find(model)[0])
    assert [(v.name, len(v.layers), v.sketch.shape) for v in values] == [("x", 2, (K, 48)), ("pool_out", 1, (24, 8))]


def test_the_mean_error_is_left_out_only_where_every_reader_has_a_bias_that_takes_it() -> None:
    for policy, expected in ((None, [False, False]), ("none", [False, False]), ("existing", [True, True]), ("any", [True, True])):
        assert [v.centred for v in activation_ranges.inputs_of(find(graphs.chain())[0], policy)] == expected  # type: ignore[arg-type]
    for policy, expected in (("existing", [False, False]), ("any", [True, True])):
        assert [v.centred for v in activation_ranges.inputs_of(find(graphs.masked())[0], policy)] == expected  # type: ignore[arg-type]
    assert not any(v.centred for v in activation_ranges.products_of(find(graphs.chain())[0]))


def test_wide_products_are_judged_behind_a_narrow_projection() -> None:
    """A vocabulary's worth of outputs would make the identity a matrix of gigabytes."""
    (narrow,), (wide,) = (activation_ranges.products_of(find(graphs.matmul(K, n))[0]) for n in (activation_ranges.SKETCH, 50_000))
    np.testing.assert_array_equal(narrow.sketch, np.eye(activation_ranges.SKETCH, dtype=np.float32))
    assert (wide.sketch.shape, wide.sketch.dtype) == ((50_000, activation_ranges.SKETCH), np.float32)
    np.testing.assert_allclose(np.square(wide.sketch).sum(axis=1), 1)


# Statistics of quantized inputs


@pytest.mark.parametrize("grid", [grid for of_type in GRIDS for grid in of_type], ids=str)
def test_moments_are_of_the_quantized_input_and_the_float_mean_is_kept(grid: Activation) -> None:
    model = graphs.matmul(opset=11)
    x = feeds(model)
    stats = collect(model, find(model)[0], CalibrationContext(data_of(model, [x]), grids={"x": GridChoice(grid)})).stats["x"]
    seen, plain = rounded(x["x"], grid).reshape(-1, K).astype(np.float64), x["x"].reshape(-1, K).astype(np.float64)
    assert stats.activation == grid
    np.testing.assert_allclose(stats.gram, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-4 * np.abs(stats.gram).max())
    np.testing.assert_allclose(stats.mean, seen.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stats.target_mean, plain.mean(axis=0), rtol=1e-3, atol=1e-3)
    assert np.abs(stats.mean - stats.target_mean).max() > 1e-3
    with pytest.raises(ValueError, match="under different grids cannot be combined"):
        stats.combine(collect(model, find(model)[0], CalibrationContext(data_of(model, [x]))).stats["x"])


def test_grids_hold_zero_exactly() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-30, 0.0), (-1e30, 1e30)):
        for signed in (False, True):
            grid = ActivationGrid.of_range(low, high, signed)
            assert np.float32(grid.scale) == grid.scale > 0
            assert grid.limits[0] <= grid.zero_point <= grid.limits[1]
            step = grid.scale * 0.51
            assert grid.range[0] - step <= min(low, 0)
            assert grid.range[1] + step >= max(high, 0)


# Sentinels, end to end


@pytest.mark.parametrize("form", ["qdq-int8", "dynamic-int8"])
@pytest.mark.parametrize("sentinel", [-1e9, -1e30])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_sentinels_do_not_wreck_a_layer(form: Any, sentinel: float, scale: float) -> None:
    model = graphs.matmul_bias()
    x = feeds(model, rows=40)
    x["x"] *= np.float32(scale)
    x["x"][3, 1, 5] = x["x"][7, 0, :] = sentinel
    made, report = magr_onnx.optimize(model, x, format=form)
    (note,) = report.notes
    assert note.startswith(f"x: values from {sentinel:g} to ")
    assert "taken as masks" in note
    real = np.ones(x["x"].shape[:2], bool)
    real[3, 1] = real[7, 0] = False
    with Session(graphs.matmul_bias()) as before, Session(made) as after:
        expected, found = before.run(x)[0][real], after.run(x)[0][real]
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)  # seen: 0.015 to 0.020
    assert np.abs((found - expected).mean(axis=0)).max() < 2e-3 * np.abs(expected).max()


def test_without_sentinels_nothing_is_said_and_nothing_clipped() -> None:
    model = graphs.matmul_bias()
    made, report = magr_onnx.optimize(model, {"x": random(20, 3, K)}, format="dynamic-int8")
    assert report.notes == ()
    assert "Clip" not in [n.op_type for n in made.graph]


@pytest.mark.parametrize("name", ["half steps", "channels", "one side"])
def test_the_grid_near_few_levels_beats_all_grids_around_their_range(name: str) -> None:
    images = np.arange(256) / 255
    levels = {
        "half steps": 2 * images - 1,
        "channels": np.unique([(images - mean) / deviation for mean, deviation in ((0.49, 0.25), (0.48, 0.24), (0.45, 0.26))]),
        "one side": images * 3.7 + 0.1,
    }[name]
    low, high = min(levels.min(), 0), max(levels.max(), 0)

    def error(step: float, zero: int) -> float:
        return float(np.square((np.clip(np.rint(levels / step) + zero, 0, 255) - zero) * step - levels).mean())

    step, zero = grid_near_levels(levels, np.ones(len(levels)), low, high)
    least_step = (high - low) / 255
    assert least_step <= step <= 1.07 * least_step
    assert zero in range(256)
    assert all(error(step, zero) <= 1.01 * error(f * least_step, round(-low / (f * least_step))) for f in np.linspace(1, 1.06, 25))
    if name == "half steps":
        assert error(step, zero) < error(least_step, round(-low / least_step)) / 3


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_what_is_beyond_the_values_seen(kind: str) -> None:
    """The estimate is the mean of what other rows lose, on average over draws: of three values a row, clipped at or beyond the largest."""
    for factor in (0.9, 1.0, 1.2):
        estimated, found = 0.0, 0.0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            seen, fresh = (rng.standard_normal((n, 3)) if kind == "normal" else rng.exponential(1, (n, 3)) for n in (80, 20_000))
            low, high = factor * min(seen.min(), 0), factor * seen.max()
            estimated += histogram_of(seen).unseen(low, high, len(seen))
            found += float(np.square(fresh - np.clip(fresh, low, high)).sum()) / len(fresh)
        assert 0.5 < estimated / found < 3, factor


def few_rows(seed: int, spread: float) -> tuple[ir.Model, Array, Array, Array]:
    """A layer, its weight, 64 rows to choose a range by, and others; one row in 50 is larger, and weights read less of large channels."""
    rng = np.random.default_rng(seed)
    channels = np.exp(spread * rng.standard_normal(64))
    weight = (rng.standard_normal((64, 2)) / channels[:, None]).astype(np.float32)
    x = np.maximum(rng.standard_normal((64 + 2048, 64)), 0) * channels
    x = (x * np.where(rng.random((len(x), 1)) < 0.02, 2.5, 1)).astype(np.float32)
    b = Builder()
    model = b.model(b.node("MatMul", [b.input("x", ["batch", 64]), b.constant("w", weight)], "layer"), ["batch", 2])
    return model, weight, x[:64], x[64:]


@pytest.mark.parametrize(("kind", "spread", "of_sums"), [("dynamic", 0.5, 1.1), ("dynamic", 1.0, 0.95), ("uint8", 0.5, 0.7)])
def test_few_rows_do_not_show_the_largest_values(kind: Any, spread: float, of_sums: float) -> None:
    """On fresh rows, the error relative to that with the range of the rows that were seen; with no clipping, where it is dynamic."""
    errors = []
    for seed in range(32):
        model, weight, x, fresh = few_rows(seed, spread)
        context = CalibrationContext(data_of(model, [{"x": x[at : at + 16]} for at in range(0, 64, 16)]))
        values = activation_ranges.inputs_of(find(model)[0])
        grids = (activation_ranges.choose(model, values, context, method=m, kind=kind)["x"].grid for m in ("auto", "min-max"))
        batches = [fresh[at : at + 64] for at in range(0, len(fresh), 64)]
        errors.append([sum(float(np.square((rounded(batch, grid) - batch) @ weight).sum()) for batch in batches) for grid in grids])
    chosen, plain = np.array(errors).T
    assert chosen.sum() < of_sums * plain.sum()
    assert kind != "dynamic" or (chosen < 3 * plain).all()
