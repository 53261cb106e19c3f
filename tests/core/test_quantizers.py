"""Quantizers against naive float64 references, and the guarantees of every registry entry."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from magr_onnx.core.grid import Grid, minmax, search
from magr_onnx.core.linalg import column_errors, damped, layer_error
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, comq, diagonal, gptq, rtn
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from tests.helpers import Array, activations, gptq_quantized, gram_of, layer

pytestmark = pytest.mark.usefixtures("each_backend")

K, N = 96, 24
SPECS = [WeightSpec(2, None), WeightSpec(3, 32), WeightSpec(4, None, symmetric=True), WeightSpec(4, 20), WeightSpec(8, None)]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def error(weight: QuantizedWeight, target: Array, gram: Array) -> float:
    return layer_error(weight.dequantize().astype(np.float64) - target, gram)


def nearest(w: Array, scales: Array, zeros: Array, top: int) -> Array:
    codes: Array = np.clip(np.rint(w / scales) + zeros, 0, top)
    return codes


def naive_gptq(weights: Array, gram: Array, grid: Grid, damping: float, act_order: bool) -> Array:
    """The published algorithm: row k of the upper Cholesky factor of the inverse spreads the error of row k."""
    order = np.argsort(-gram.diagonal(), kind="stable") if act_order else np.arange(len(gram))
    inverse = np.linalg.inv(damped(gram, damping)[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    w = weights.astype(np.float64)[order]
    groups = grid.spec.group_of_row(len(w))[order]
    codes = np.empty(w.shape)
    for k, g in enumerate(groups):
        codes[order[k]] = q = nearest(w[k], grid.scales[g], grid.zeros[g], grid.spec.top)
        lost = (w[k] - grid.scales[g] * (q - grid.zeros[g])) / upper[k, k]
        w[k + 1 :] -= np.outer(upper[k, k + 1 :], lost)
    return codes


def naive_sweep(target: Array, start: QuantizedWeight, gram: Array) -> Array:
    """One pass over the rows with a rank-one update of the residual each."""
    codes = start.codes.astype(np.float64)
    grid = Grid.of(start)
    groups = start.spec.group_of_row(len(codes))
    residual = gram @ (target - start.dequantize().astype(np.float64))
    power = np.sqrt(gram.diagonal()) * np.linalg.norm(target, axis=1)
    strongest = np.array([power[groups == g].max() for g in groups])
    for k in np.lexsort((-power, -strongest)):
        if gram[k, k] == 0:
            continue
        scale, zero = grid.scales[groups[k]].astype(np.float64), grid.zeros[groups[k]]
        wanted = scale * (codes[k] - zero) + residual[k] / gram[k, k]
        q = nearest(wanted, scale, zero, start.spec.top)
        residual -= np.outer(gram[:, k], scale * (q - codes[k]))
        codes[k] = q
    return codes


def joint_refit(target: Array, weight: QuantizedWeight, gram: Array) -> QuantizedWeight:
    """All scales of every column at once, by least squares, for the codes as they are; where that lowers the error."""
    root, rows = np.linalg.cholesky(gram).T, weight.spec.group_of_row(len(target))
    centred = weight.codes - weight.zero_points.astype(np.float64)[rows]
    member = rows[:, None] == np.arange(weight.spec.groups(len(target)))
    scales = weight.scales.copy()
    for j in range(target.shape[1]):
        best, *_ = np.linalg.lstsq(root @ (centred[:, j, None] * member), root @ target[:, j].astype(np.float64))
        scales[:, j] = np.where(best > 0, best, scales[:, j])
    refitted = QuantizedWeight(weight.codes, scales, weight.zero_points, weight.spec)
    before, after = (column_errors(w.dequantize().astype(np.float64) - target, gram) for w in (weight, refitted))
    return QuantizedWeight(weight.codes, np.where(after < before, scales, weight.scales), weight.zero_points, weight.spec)


def rounded(weights: Array, gram: Array, spec: WeightSpec) -> QuantizedWeight:
    return rtn.quantize(weights, gram.diagonal(), spec)


@some_specs
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_gptq_is_the_published_algorithm(spec: WeightSpec, act_order: bool, seed: int) -> None:
    weights, gram = layer(K, N, seed)
    grid = search(weights, spec, gram.diagonal())
    found = gptq_quantized(weights, gram, spec, damping=0.01, act_order=act_order)
    expected = naive_gptq(weights, gram, grid, 0.01, act_order)
    assert (found.codes != expected).mean() < 1e-3  # float32 may break a tie differently
    assert (found.codes != grid.codes(weights)).mean() > 0.05  # feedback did something
    np.testing.assert_array_equal(found.scales, grid.scales)


@some_specs
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_on_the_same_grid(spec: WeightSpec, act_order: bool) -> None:
    weights, gram = layer(K, N)
    for beta in (None, 0.9):
        plain = rtn.quantize(weights, gram.diagonal(), spec, beta=beta)
        found = gptq_quantized(weights, gram, spec, beta=beta, act_order=act_order)
        np.testing.assert_array_equal(found.scales, plain.scales)
        np.testing.assert_array_equal(found.zero_points, plain.zero_points)
        assert error(found, weights, gram) < 0.8 * error(plain, weights, gram)


def test_feedback_never_looks_ahead() -> None:
    _, gram = layer(K, N)
    feedback = gptq.prepare(gram)
    np.testing.assert_array_equal(np.triu(feedback.matrix), 0)
    np.testing.assert_array_equal(np.sort(feedback.order), np.arange(K))
    assert (np.diff(gram.diagonal()[feedback.order]) <= 0).all()
    np.testing.assert_array_equal(gptq.prepare(gram, act_order=False).order, np.arange(K))


def problem_of(weights: Array, gram: Array, spec: WeightSpec) -> Problem:
    return Problem(weights, weights, LayerStats(gram, np.zeros(len(gram)), 100), False, spec)


@pytest.mark.parametrize("name", ["gptq", "comq"])
def test_damping_rises_until_the_matrix_factors(name: str) -> None:
    weights, _ = layer(K, N)
    spec = WeightSpec(4, 32)
    indefinite = np.eye(K)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    solution = QUANTIZERS[name].run(problem_of(weights, indefinite, spec), Options(damping=0.01))
    assert solution.notes[0] == "Cholesky failed at damping 0.01; used 1"
    slightly = np.eye(K)
    slightly[0, 1] = slightly[1, 0] = 1.04 + 5e-7  # of 100 rows: the prior adds 0.04 to the diagonal
    solution = QUANTIZERS[name].run(problem_of(weights, slightly, spec), Options(damping=0.0))
    assert solution.notes[0] == "Cholesky failed at damping 0; used 1e-06"
    singular = gram_of(activations(20, K))
    singular[5] = singular[:, 5] = 0
    for gram, damping in ((gram_of(activations(300, K)), 0.01), (singular, 0.0)):  # with the prior, no matrix of rows is singular
        fine = QUANTIZERS[name].run(problem_of(weights, gram, spec), Options(damping=damping))
        assert not any("Cholesky" in note for note in fine.notes)


def test_gptq_rounds_the_weights_of_dead_inputs() -> None:
    weights, gram = layer(K, N)
    gram[5] = gram[:, 5] = 0
    spec = WeightSpec(4, 32)
    found = gptq_quantized(weights, gram, spec)
    np.testing.assert_array_equal(found.codes[5], rounded(weights, gram, spec).codes[5])


@some_specs
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_is_plain_coordinate_descent(spec: WeightSpec, seed: int) -> None:
    weights, gram = layer(K, N, seed)
    gram[7] = gram[:, 7] = 0
    start = rounded(weights, gram, spec)
    found = comq.refine(weights, start, gram, sweeps=1, rescale=False)
    assert found.sweeps == 1
    assert (found.weight.codes != naive_sweep(weights, start, gram)).mean() < 1e-3
    assert (found.weight.codes != start.codes).mean() > 0.05
    np.testing.assert_array_equal(found.weight.codes[7], start.codes[7])
    np.testing.assert_array_equal(found.weight.scales, start.scales)


@some_specs
@pytest.mark.parametrize("rescale", [False, True])
def test_refining_lowers_the_error_of_any_start(spec: WeightSpec, rescale: bool) -> None:
    weights, gram = layer(K, N)
    for start in (rounded(weights, gram, spec), gptq_quantized(weights, gram, spec)):
        found = comq.refine(weights, start, gram, sweeps=6, rescale=rescale, tolerance=0.0)
        errors = np.array(found.errors)
        assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
        assert errors[-1] < 0.99 * errors[0]
        assert errors[0] == pytest.approx(error(start, weights, gram), rel=1e-3)
        assert errors[-1] == pytest.approx(error(found.weight, weights, gram), rel=1e-3)


def test_refining_stops_when_it_no_longer_pays() -> None:
    weights, gram = layer(K, N)
    start = rounded(weights, gram, WeightSpec(4, 32))
    found = comq.refine(weights, start, gram, sweeps=100, tolerance=0.02)
    assert found.sweeps < 100
    assert found.errors[-1] > 0.98 * found.errors[-2]
    unmoved = comq.refine(weights, start, gram, sweeps=0).weight
    assert np.array_equal(unmoved.codes, start.codes)
    assert np.array_equal(unmoved.scales, start.scales)


@pytest.mark.parametrize("spec", [*SPECS, WeightSpec(3, 32, scale_dtype="float16"), WeightSpec(2, 7, symmetric=True)], ids=str)
def test_a_sweep_with_refits_raises_the_error_of_no_column(spec: WeightSpec) -> None:
    weights, gram = layer(K, N)
    h = gram.astype(np.float32)
    start = minmax(weights, spec, 0.9).weight(minmax(weights, spec, 0.9).codes(weights))
    descent = comq.Descent.of(weights, start, h)
    descent.sweep(h, rescale=True)
    found = descent.weight()
    before, after = (column_errors(w.dequantize().astype(np.float64) - weights, gram) for w in (start, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert descent.error == pytest.approx(after.sum() - before.sum(), rel=1e-3)
    assert (found.scales != start.scales).mean() > 0.5
    np.testing.assert_array_equal(found.scales, found.scales.astype(spec.scale_dtype).astype(np.float32))
    np.testing.assert_allclose(descent.difference, weights - found.dequantize(), atol=1e-6 * np.abs(weights).max())


@pytest.mark.parametrize("k", [K, 200])
@pytest.mark.parametrize("group", [None, 32])
def test_a_refitted_scale_is_the_least_squares_solution(group: int | None, k: int) -> None:
    """With everything else as it is: true of the group that was visited last, in a layer of one panel and of several."""
    weights, gram = layer(k, N)
    spec = WeightSpec(4, group)
    h = gram.astype(np.float32)
    descent = comq.Descent.of(weights, rounded(weights, gram, spec), h)
    descent.sweep(h, rescale=True)
    found = descent.weight()
    last = descent.arranged[-1][-1].group
    rows = spec.group_of_row(k) == last
    codes = np.where(rows[:, None], found.codes - found.zero_points.astype(np.float64)[spec.group_of_row(k)], 0)
    rest = weights - np.where(rows[:, None], 0, found.dequantize()).astype(np.float64)
    best = np.einsum("kn,kn->n", codes, gram @ rest) / np.einsum("kn,kn->n", codes, gram @ codes)
    np.testing.assert_allclose(found.scales[last], best, rtol=1e-3)


@pytest.mark.parametrize("spec", [*SPECS, WeightSpec(2, 130), WeightSpec(3, 7)], ids=str)
def test_refining_reaches_what_joint_refits_reach(spec: WeightSpec) -> None:
    """Sweeps over single rows in turn, and after each all scales of a column at once by least squares; in float64, summed over layers."""
    plain = ours = 0.0
    for seed in range(3):
        weights, gram = layer(300, N, seed)
        gram = damped(gram, 0.05)
        start = gptq_quantized(weights, gram, spec)
        expected = start
        for last in (False, False, False, True):
            expected = QuantizedWeight(naive_sweep(weights, expected, gram).astype(np.uint8), expected.scales, expected.zero_points, spec)
            if not last:
                expected = joint_refit(weights, expected, gram)
        unit = error(start, weights, gram)
        plain += error(expected, weights, gram) / unit
        ours += error(comq.refine(weights, start, gram, sweeps=4, tolerance=0.0).weight, weights, gram) / unit
    assert ours < 1.01 * plain


@pytest.mark.parametrize("name", ["rtn", "gptq", "comq"])  # the others need an accumulator: test_constrained.py
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 7, 32])
def test_every_quantizer_solves_every_grid(name: str, bits: int, symmetric: bool, group: int | None) -> None:
    weights, _ = layer(45, 6)
    x = activations(200, 45)
    spec = WeightSpec(bits, group, symmetric)
    problem = Problem(weights, weights, LayerStats(gram_of(x), x.mean(axis=0), 200), True, spec)
    found = QUANTIZERS[name].run(problem, Options()).weight
    assert found.spec == spec
    assert found.codes.shape == weights.shape
    assert found.codes.dtype == found.zero_points.dtype == np.uint8
    assert max(found.codes.max(), found.zero_points.max()) <= spec.top
    assert found.scales.dtype == np.float32
    assert np.isfinite(found.dequantize()).all()
    assert error(found, weights, problem.gram) <= error(rounded(weights, problem.gram, spec), weights, problem.gram)


@some_specs
def test_order_of_quantizers(spec: WeightSpec) -> None:
    weights, gram = layer(K, N)
    problem = problem_of(weights, gram, spec)
    rtn_error, gptq_error, comq_error = (
        error(QUANTIZERS[name].run(problem, Options()).weight, weights, gram) for name in ("rtn", "gptq", "comq")
    )
    assert comq_error < gptq_error < rtn_error


@some_specs
@pytest.mark.parametrize("tail", [0.0, 3.0])
def test_comq_never_ends_above_gptq_under_the_matrix_it_minimises(spec: WeightSpec, tail: float) -> None:
    weights, gram = layer(K, N, tail=tail)
    problem = problem_of(weights, gram, spec)
    start, found = (QUANTIZERS[name].run(problem, Options(damping=0.1)) for name in ("gptq", "comq"))
    h = damped(gram, 0.1)
    assert error(found.weight, weights, h) < error(start.weight, weights, h)
    assert found.notes == start.notes
    assert found.figures["sweeps"] >= 1
    assert found.figures["error"] < found.figures["error_start"]


@some_specs
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_without_data_is_rounding(spec: WeightSpec, act_order: bool) -> None:
    weights, _ = layer(K, N)
    problem = Problem(weights, weights, LayerStats.data_free(K), True, spec)
    found, plain = (QUANTIZERS[name].run(problem, Options(act_order=act_order)).weight for name in ("gptq", "rtn"))
    np.testing.assert_array_equal(found.codes, plain.codes)


@some_specs
@pytest.mark.parametrize("name", ["comq", "auto"])
def test_without_data_errors_cancel_where_inputs_are_positive(spec: WeightSpec, name: str) -> None:
    """Behind a Relu the output is better than rounded; where the mean is zero it is as good, but for one part in K."""
    rng = np.random.default_rng(0)
    weights, _ = layer(K, 4 * N)
    problem = Problem(weights, weights, LayerStats.data_free(K), False, spec)
    ours, nearest = (QUANTIZERS[method].run(problem, Options()).weight.dequantize() - weights for method in (name, "rtn"))
    x = rng.standard_normal((4000, K))
    assert np.square(np.maximum(x, 0) @ ours).mean() < 0.85 * np.square(np.maximum(x, 0) @ nearest).mean()
    assert np.square(x @ ours).mean() < (1 + 3 / K) * np.square(x @ nearest).mean()


@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize("bits", [3, 8])
def test_without_data_errors_cancel_where_neighbours_are_alike(bits: int, channels: int) -> None:
    """Channels have means of any sign, and taps of one vary together; white inputs lose little."""
    rng, taps = np.random.default_rng(0), 9
    k, spec = channels * taps, WeightSpec(bits, None, symmetric=True)
    weights, _ = layer(k, 64)
    noise = []
    smooth = np.repeat(rng.standard_normal((4000, channels)) + rng.standard_normal(channels), taps, axis=1)
    white = rng.standard_normal((4000, k))
    for name, among in (("rtn", 1), ("comq", 1), ("comq", taps)):
        problem = Problem(weights, weights, LayerStats.data_free(k, taps=among), False, spec)
        difference = QUANTIZERS[name].run(problem, Options()).weight.dequantize() - weights
        noise.append([np.square(x @ difference).mean() for x in (smooth + 0.5 * white, white)])
    nearest, before, found = noise
    assert found[0] < 0.5 * nearest[0]
    assert found[0] < 0.8 * before[0]
    assert found[1] < 1.2 * nearest[1]


@pytest.mark.parametrize("clipped", [False, True])
def test_the_cheapest_codes_are_moved_as_long_as_the_error_falls(clipped: bool) -> None:
    """The least error among all sets of weights that are rounded the other way, by trying them all."""
    rng = np.random.default_rng(1)
    k, step, r = 7, np.float32(0.25), 0.25
    spec = WeightSpec(4, None, symmetric=True)
    weights = (rng.uniform(-7, 7, (k, 40)) * step).astype(np.float32)
    if clipped:
        weights[0] *= 3
    grid = Grid(np.full((1, 40), step), np.full((1, 40), 8, np.float32), spec, k)
    start = grid.weight(grid.codes(weights))
    moved = diagonal.cancel(weights, start, r)
    np.testing.assert_array_equal(moved.scales, start.scales)
    for w, before, after in zip(weights.T.astype(float), start.codes.T.astype(int), moved.codes.T.astype(int), strict=True):
        total = ((before - 8) * step - w).sum()
        candidates = []
        for flips in itertools.product((0, 1), repeat=k):
            codes = before - int(np.sign(total)) * np.array(flips)
            if codes.min() >= 0 and codes.max() <= 15:
                d = (codes - 8) * step - w
                candidates.append(np.square(d).sum() + r * d.sum() ** 2)
        d = (after - 8) * step - w
        assert np.square(d).sum() + r * d.sum() ** 2 == pytest.approx(min(candidates), rel=1e-5)


def test_factorization_is_shared_by_layers_of_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    prepare = gptq.prepare

    def counted(gram: Array, damping: float, act_order: bool) -> gptq.Feedback:
        calls.append(damping)
        return prepare(gram, damping, act_order)

    monkeypatch.setattr(gptq, "prepare", counted)
    weights, gram = layer(K, N)
    problem = problem_of(weights, gram, WeightSpec(4, 32))
    sibling = dataclasses.replace(problem, weights=-weights, target=-weights)
    for p in (problem, sibling):
        gptq.run(p, Options(damping=0.1))
    gptq.run(problem, Options(damping=0.2))
    assert calls == [0.1, 0.2]


def test_target_may_differ_from_the_weights() -> None:
    weights, gram = layer(K, N)
    target = weights + 0.01 * np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    problem = dataclasses.replace(problem_of(weights, gram, WeightSpec(4, 32)), target=target)
    start, found = (QUANTIZERS[name].run(problem, Options()).weight for name in ("gptq", "comq"))
    assert error(found, target, gram) < error(start, target, gram)
