"""Quantizers under an accumulator: codes that fit whatever the inputs are, and what that costs.

The oracle for "fits" is the worst input of every tile, chosen term by term in Python integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.core.grid import search
from magr_onnx.core.linalg import column_errors, damped, layer_error
from magr_onnx.core.overflow.accumulator import Accumulator, Budget, data_type_bits, smallest_feasible
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, Solution, a2q, batched, comq, gptq
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from magr_onnx.errors import MagrError, OptionError
from magr_onnx.passes import Plan, Quantize, QuantizeActivations
from magr_onnx.workflow import verify_output
from tests import graphs
from tests.helpers import EXAMPLES, Array, activations, gram_of, layer, project_by_sorting

WITH_ACCUMULATORS = [name for name, quantizer in QUANTIZERS.items() if quantizer.accumulators != "none"]
RANGES = {"uint8": (0, 255), "int8": (-128, 127), "shifted": (-128, 127 + 128)}
SPECS = [WeightSpec(3, None), WeightSpec(4, None, symmetric=True), WeightSpec(8, None), WeightSpec(8, None, symmetric=True)]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def worst(codes: Array, tile: int | None, x_min: int, x_max: int) -> list[tuple[int, int]]:
    """Least and greatest sum of every tile of every column over all inputs."""
    found = []
    for column in codes.T.tolist():
        for at in range(0, len(column), tile or len(column)):
            part = column[at : at + (tile or len(column))]
            found.append((sum(min(q * x_min, q * x_max) for q in part), sum(max(q * x_min, q * x_max) for q in part)))
    return found


def fit(weight: QuantizedWeight, budget: Budget) -> bool:
    bits, codes = budget.accumulator.bits, weight.codes.astype(int) - weight.spec.middle
    for taps in budget.taps:
        channels = len(codes) // taps
        ordered = np.array([codes[channel * taps + tap] for tap in range(taps) for channel in range(channels)])
        extremes = worst(ordered, budget.accumulator.tile, budget.x_min, budget.x_max)
        if any(low < -(2 ** (bits - 1)) or high > 2 ** (bits - 1) - 1 for low, high in extremes):
            return False
    return True


def problem_of(k: int, n: int, spec: WeightSpec, budget: Budget | None = None, seed: int = 0, spread: float = 0.0) -> Problem:
    """Correlated inputs with a mean; ``spread`` makes some columns' codes small beside their peak, so that they fit more easily."""
    weights, _ = layer(k, n, seed)
    weights[0] *= np.exp(spread * np.arange(n)).astype(np.float32)
    x = activations(4 * k + 20, k, seed, tail=0.3)
    return Problem(weights, weights, LayerStats(gram_of(x), x.mean(axis=0), len(x)), True, spec, budget)


def solve(name: str, problem: Problem, **options: Any) -> Solution:
    return QUANTIZERS[name].run(problem, Options(**options))


def relative(weight: QuantizedWeight, problem: Problem) -> float:
    difference = weight.dequantize().astype(np.float64) - problem.target
    return float(np.sqrt(layer_error(difference, problem.gram) / layer_error(problem.target.astype(np.float64), problem.gram)))


@EXAMPLES
@given(
    st.sampled_from(WITH_ACCUMULATORS),
    st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(0, 5)),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(list(RANGES)),
    st.sampled_from([None, 2, 7, 64]),
    st.integers(0, 9),
    st.booleans(),
)
def test_codes_fit_any_budget(
    name: str, shape: tuple[int, int, int], bits: int, symmetric: bool, kind: str, tile: int | None, more: int, act_order: bool
) -> None:
    k, n, seed = shape
    least = smallest_feasible(Budget(Accumulator(), *RANGES[kind]))
    budget = Budget(Accumulator(least + more, tile), *RANGES[kind])
    problem = problem_of(k, n, WeightSpec(bits, None, symmetric), budget, seed)
    found = solve(name, problem, act_order=act_order, sweeps=3).weight
    assert fit(found, budget)
    assert found.codes.max() <= found.spec.top
    assert np.isfinite(found.dequantize()).all()


@EXAMPLES
@given(
    st.sampled_from(WITH_ACCUMULATORS),
    st.tuples(st.integers(1, 6), st.sampled_from([2, 4, 9]), st.integers(0, 5)),
    st.sampled_from([2, 4, 7]),
    st.sampled_from([1, 2]),
    st.integers(0, 9),
    st.booleans(),
)
def test_codes_of_a_convolution_fit_in_every_order(
    name: str, shape: tuple[int, int, int], tile: int, orders: int, more: int, signed: bool
) -> None:
    channels, taps, seed = shape
    kind = RANGES["int8" if signed else "uint8"]
    least = smallest_feasible(Budget(Accumulator(), *kind))
    budget = Budget(Accumulator(least + more, tile), *kind, taps=(taps, 1)[:orders])
    weight = solve(name, problem_of(channels * taps, 3, WeightSpec(8, None, symmetric=True), budget, seed), sweeps=3).weight
    assert fit(weight, budget)
    low, high = budget.column_extremes(weight.raw())
    assert low.min() >= budget.low
    assert high.max() <= budget.high


def groups_of(count: int, k: int, n: int) -> tuple[Array, Array]:
    """Weights ``(G, K, N)`` and second moments ``(G, K, K)`` of many groups."""
    parts = [layer(k, n, seed) for seed in range(count)]
    return np.stack([weights for weights, _ in parts]), np.stack([gram for _, gram in parts])


@pytest.mark.parametrize(
    "budget", [Budget(Accumulator(15)), Budget(Accumulator(14, 4), -128, 127, (1, 9)), Budget(Accumulator(9))], ids=str
)
@pytest.mark.parametrize("n", [1, 3])
def test_many_groups_fit_together_nearly_as_well_as_one_by_one(budget: Budget, n: int) -> None:
    """Seen: 1.1 to 1.4 times the squared error."""
    spec = WeightSpec(8, None, symmetric=True)
    weights, grams = groups_of(24, 9, n)
    weights[:4] *= np.array([1, *[1e-3] * 8])[:, None]  # these have one large code, and so little to fit
    free = batched.solve(weights, grams, spec, 0.1)
    together = batched.solve(weights, grams, spec, 0.1, budget=budget)
    alone = 0.0
    for index, weight in enumerate(together.weights):
        assert fit(weight, budget)
        if fit(free.weights[index], budget):
            np.testing.assert_array_equal(weight.codes, free.weights[index].codes)
        stats = LayerStats(grams[index], np.zeros(9), 100)
        problem = Problem(weights[index], weights[index], stats, False, spec, budget)
        difference = solve("comq", problem, damping=0.1).weight.dequantize().astype(np.float64) - weights[index]
        alone += layer_error(difference, damped(grams[index], 0.1))
    assert together.errors.sum() < 1.6 * alone
    assert (together.errors >= free.errors * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", ["gptq", "comq"])
@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("tile", [None, 1, 7])
def test_room_for_everything_changes_nothing(name: str, spec: WeightSpec, kind: str, tile: int | None) -> None:
    k = 45
    x_min, x_max = RANGES[kind]
    enough = data_type_bits(tile or k, x_min, x_max, -spec.middle, spec.top - spec.middle)
    free = solve(name, problem_of(k, 5, spec)).weight
    for bits in (enough, 64):
        solution = solve(name, problem_of(k, 5, spec, Budget(Accumulator(bits, tile, max(32, bits)), x_min, x_max)))
        assert solution.figures["columns_constrained"] == 0
        for field in ("codes", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(solution.weight, field), getattr(free, field))


@some_specs
@pytest.mark.parametrize("tile", [None, 16])
def test_columns_that_fit_are_left_alone(spec: WeightSpec, tile: int | None) -> None:
    free = solve("gptq", problem_of(64, 12, spec, spread=0.6)).weight
    reach = [max(max(-low - 1, high) for low, high in worst(c, tile, 0, 255)) for c in np.split(free.raw().astype(int), 12, axis=1)]
    bits = min(reach).bit_length() + 1  # what the easiest column needs
    budget = Budget(Accumulator(bits, tile))
    fitting = np.array(reach) < 2 ** (bits - 1)
    assert 0 < fitting.sum() < 12
    solution = solve("gptq", problem_of(64, 12, spec, budget, spread=0.6))
    assert solution.figures["columns_constrained"] == 12 - fitting.sum()
    for field in ("codes", "scales", "zero_points"):
        a, b = getattr(solution.weight, field), getattr(free, field)
        np.testing.assert_array_equal(a[:, fitting], b[:, fitting])
    assert (solution.weight.codes != free.codes)[:, ~fitting].any(axis=0).all()


def nearest_that_fits(codes: Array, row: int, wanted: Array, spec: WeightSpec, budget: Budget) -> Array:
    """The code nearest to ``wanted`` in every column that fits beside the other rows of ``codes``, by trying all of them."""
    found = np.empty(codes.shape[1])
    limit = 2 ** (budget.accumulator.bits - 1)
    for j in range(codes.shape[1]):
        column = codes[:, j : j + 1].copy()
        allowed = []
        for raw in range(-spec.middle, spec.top - spec.middle + 1):
            column[row] = raw
            if all(low >= -limit and high < limit for low, high in worst(column, budget.accumulator.tile, budget.x_min, budget.x_max)):
                allowed.append(raw)
        found[j] = min(allowed, key=lambda raw: abs(raw - wanted[j]))
    return found


BUDGETS = [Budget(Accumulator(13)), Budget(Accumulator(12, 7)), Budget(Accumulator(12, 7), -128, 127)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_under_a_budget_is_the_published_algorithm(budget: Budget, act_order: bool) -> None:
    spec = WeightSpec(4, None)
    weights, gram = layer(24, 6)
    grid = search(weights, spec, gram.diagonal())
    found = gptq.solve(weights, gptq.prepare(gram, 0.1, act_order), grid, budget)
    order = np.argsort(-gram.diagonal(), kind="stable") if act_order else np.arange(24)
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram, 0.1)[np.ix_(order, order)])).T
    w, raw = weights.astype(np.float64)[order], np.zeros((24, 6))
    for i, row in enumerate(order):
        wanted = np.rint(w[i] / grid.scales[0]) + grid.zeros[0] - spec.middle
        raw[row] = nearest_that_fits(raw, row, wanted, spec, budget)
        lost = (w[i] - grid.scales[0] * (raw[row] + spec.middle - grid.zeros[0])) / upper[i, i]
        w[i + 1 :] -= np.outer(upper[i, i + 1 :], lost)
    np.testing.assert_array_equal(found.raw(), raw)
    assert (found.codes != gptq.solve(weights, gptq.prepare(gram, 0.1, act_order), grid).codes).mean() > 0.05  # the budget did something


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_sweep_takes_the_best_code_that_fits(budget: Budget) -> None:
    spec = WeightSpec(4, None)
    weights, gram = layer(24, 6)
    start = gptq.solve(weights, gptq.prepare(gram), search(weights, spec, gram.diagonal()), budget)
    found = comq.refine(weights, start, gram, sweeps=1, rescale=False, budget=budget).weight
    raw, scale = start.raw().astype(np.float64), start.scales[0].astype(np.float64)
    centre = spec.middle - start.zero_points[0].astype(np.float64)
    residual = gram @ (weights - start.dequantize().astype(np.float64))
    for row in np.argsort(-np.sqrt(gram.diagonal()) * np.linalg.norm(weights, axis=1), kind="stable"):
        wanted = raw[row] + residual[row] / gram[row, row] / scale
        chosen = nearest_that_fits(raw, row, wanted, spec, budget)
        residual -= np.outer(gram[:, row], scale * (chosen - raw[row]))
        raw[row] = chosen
    np.testing.assert_array_equal(found.raw(), raw)
    assert (found.raw() != start.raw()).any()
    np.testing.assert_array_equal(found.dequantize(), ((raw + centre) * start.scales).astype(np.float32))


@some_specs
@pytest.mark.parametrize("tile", [None, 7])
def test_refining_under_a_budget_only_lowers_the_error(spec: WeightSpec, tile: int | None) -> None:
    budget = Budget(Accumulator(13, tile))
    problem = problem_of(64, 8, spec, budget)
    damping = problem.damping(Options())
    h = damped(problem.gram, damping)
    start, found = (solve(name, problem, damping=damping) for name in ("gptq", "comq"))
    errors = [float(column_errors(s.weight.dequantize().astype(np.float64) - problem.target, h).sum()) for s in (start, found)]
    assert errors[1] < errors[0]
    assert found.figures["error"] < found.figures["error_start"] == pytest.approx(errors[0], rel=1e-3)
    path = np.array(comq.refine(problem.target, start.weight, h, sweeps=6, tolerance=0.0, budget=budget).errors)
    assert (path[1:] <= path[:-1] * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "width", "tile", "kind"), [(4, 16, None, "uint8"), (4, 14, 64, "int8"), (8, 16, 64, "uint8")])
def test_error_feedback_beats_projection_by_far(bits: int, width: int, tile: int | None, kind: str) -> None:
    """Seen: gptq 0.12 to 0.13, comq 0.10 to 0.12, the better of a2q and a2q+ 0.43 to 0.46 at 4 bits."""
    budget = Budget(Accumulator(width, tile), *RANGES[kind])
    problem = problem_of(256, 8, WeightSpec(bits, None, symmetric=False), budget)
    error = {name: relative(solve(name, problem).weight, problem) for name in WITH_ACCUMULATORS}
    assert error["comq"] <= error["gptq"] < 0.4 * min(error["a2q"], error["a2q+"])


@pytest.mark.parametrize("name", WITH_ACCUMULATORS)
def test_more_room_is_never_worse(name: str) -> None:
    problem = problem_of(128, 8, WeightSpec(4, None))
    errors = [
        relative(solve(name, dataclasses.replace(problem, budget=Budget(Accumulator(bits)))).weight, problem) for bits in (11, 13, 15, 17)
    ]
    assert (np.diff(errors) < 0).all()


def test_zero_centred_columns_have_twice_the_room() -> None:
    problem = problem_of(128, 8, WeightSpec(8, None), Budget(Accumulator(16)))
    sums = {name: np.abs(solve(name, problem).weight.raw().astype(int)).sum(axis=0) for name in ("a2q", "a2q+")}
    assert sums["a2q"].max() <= 32767 / 255
    assert sums["a2q+"].max() <= 2 * 32767 / 255
    assert sums["a2q+"].min() > 32767 / 255


def test_a_real_column_is_weighed_before_it_is_rounded() -> None:
    """Its codes may all be less than one."""
    real = np.array([[0.75, -0.5], [0.5, -0.25], [-0.25, 0.0]])
    low, high = Budget(Accumulator(16), -1, 3).column_extremes(real)
    np.testing.assert_array_equal(low, [-2.0, -2.25])
    np.testing.assert_array_equal(high, [4.0, 0.75])


@pytest.mark.parametrize("tile", [None, 1, 4, 10, 99])
def test_tiles_are_columns_and_back(tile: int | None) -> None:
    columns = np.arange(30.0).reshape(10, 3)
    size = min(tile or 10, 10)
    tiles = a2q.tiled(columns, tile)
    assert tiles.shape == (size, 3 * -(-10 // size))
    np.testing.assert_array_equal(tiles[:, :3], columns[:size])
    if 10 % size:
        np.testing.assert_array_equal(tiles[10 % size :, -3:], 0)
    np.testing.assert_array_equal(a2q.untiled(tiles, 10, 3), columns)


@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_projection_is_the_nearest_point_for_either_sign(tile: int | None, kind: str) -> None:
    codes = np.random.default_rng(0).standard_normal((20, 6)) * 3
    budget = Budget(Accumulator(12, tile), *RANGES[kind])
    radius = budget.high / (budget.x_max - budget.x_min)
    projected = a2q.project(codes, budget)
    for at in range(0, 20, tile or 20):
        part = codes[at : at + (tile or 20)]
        expected = project_by_sorting(np.maximum(part, 0), radius) + project_by_sorting(np.minimum(part, 0), radius)
        np.testing.assert_allclose(projected[at : at + len(part)], expected, atol=1e-9)
    np.testing.assert_allclose(a2q.project(projected, budget), projected, atol=1e-9)
    assert np.abs(projected - codes).max() > 0.1


@pytest.mark.parametrize(("kind", "least"), [("uint8", 9), ("int8", 9), ("dynamic", 9)])
@pytest.mark.parametrize("tile", [None, 1, 8])
def test_infeasible_widths_are_refused_with_the_smallest_that_works(kind: Any, least: int, tile: int | None) -> None:
    def plan(bits: int) -> Plan:
        return Plan(activations=QuantizeActivations(kind), quantize=Quantize(block_size=None, accumulator_bits=bits, accumulator_tile=tile))

    plan(least).check()
    with pytest.raises(OptionError, match=f"only zero weights cannot overflow; the smallest that works is {least}"):
        plan(least - 1).check()


def test_the_smallest_width_still_has_weights() -> None:
    for name in WITH_ACCUMULATORS[:2]:
        problem = problem_of(40, 6, WeightSpec(4, None, True), Budget(Accumulator(9, 8), -128, 127))
        assert np.abs(solve(name, problem).weight.raw()).sum() > 0


def test_an_accumulator_needs_one_scale_a_column_and_a_quantizer_that_knows_it() -> None:
    with pytest.raises(OptionError, match="need one scale a column"):
        Plan.of((QuantizeActivations(), Quantize(block_size=32, accumulator_bits=16))).check()
    with pytest.raises(OptionError, match="rtn knows no accumulators; choose one of auto, gptq, comq, a2q"):
        Plan.of((QuantizeActivations(), Quantize("rtn", block_size=None, accumulator_bits=16))).check()
    with pytest.raises(OptionError, match="a2q is for accumulators only"):
        Plan.of((QuantizeActivations(), Quantize("a2q", block_size=None))).check()
    with pytest.raises(OptionError, match="a2q needs 8-bit activations"):
        Plan.of((Quantize("a2q", block_size=None, target="x86-avx2"),)).check()


FORMATS: dict[str, dict[str, Any]] = {
    "uint8": {"format": "qdq-int8"},
    "int8": {"format": "qdq-int8", "activation_type": "int8"},
    "outputs": {"format": "qdq-int8", "quantize_outputs": True},
    "dynamic": {"format": "dynamic-int8"},
}


def saturating() -> tuple[Any, list[dict[str, Array]]]:
    """A layer of weights near the ends of their range, which no machine's 16-bit pairs hold."""
    b = graphs.Builder()
    x = b.input("x", ["batch", 50])
    weight = np.sign(graphs.random(50, 12)) * np.random.default_rng(1).uniform(0.8, 1, (50, 12))
    model = b.model(
        b.node("Gemm", [x, b.constant("w", weight.astype(np.float32)), b.constant("b", graphs.random(12))], "layer"), ["batch", 12]
    )
    return model, [{"x": graphs.correlated(200, 50)}]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("target", ["x86-avx2", "arm64-neon", "generic"])
def test_what_is_made_for_a_machine_is_proved_for_it(form: str, target: str) -> None:
    model, data = saturating()
    made, _ = magr_onnx.optimize(model, data, **FORMATS[form], target=target)
    verdict = magr_onnx.verify(made, target=target, run=False)
    assert [row.verdict for row in verdict.layers] == ["proved"]


def test_without_a_target_it_is_not() -> None:
    model, data = saturating()
    made, _ = magr_onnx.optimize(model, data, format="qdq-int8")
    assert [row.verdict for row in magr_onnx.verify(made, target="x86-avx2", run=False).layers] == ["overflows"]
    assert "x86-avx2" in TARGETS


@pytest.mark.parametrize("quantizer", WITH_ACCUMULATORS)
@pytest.mark.parametrize(("form", "width", "tile"), [("uint8", 16, None), ("int8", 14, 8), ("dynamic", 12, 16)])
def test_what_is_made_for_an_accumulator_is_proved_for_it(quantizer: str, form: str, width: int, tile: int | None) -> None:
    model, data = saturating()
    made, _ = magr_onnx.optimize(model, data, **FORMATS[form], quantizer=quantizer, accumulator_bits=width, accumulator_tile=tile)
    verdict = magr_onnx.verify(made, accumulator=Accumulator(width, tile), run=False)
    assert [row.verdict for row in verdict.layers] == ["proved"]


def test_a_layer_that_the_proof_does_not_find_is_an_error() -> None:
    with pytest.raises(MagrError, match="has not found ghost"):
        verify_output.prove(graphs.matmul(), TARGETS["generic"], {"ghost"})
