"""Problems and solutions of layers: groups side by side, errors, and solutions as arrays."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import error_feedback
from magr_onnx.core.layer import (
    LayerProblem,
    LayerRecord,
    LayerSolution,
    absorbs_mean,
    join_groups,
    output_variance,
    ratio,
    relative_error,
)
from magr_onnx.core.low_rank import Factors
from magr_onnx.core.solution_arrays import from_arrays, most_bytes, to_arrays
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from tests.helpers import Array, activations, gram_of

K, N = 24, 5


def stats_of(x: Array) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x))


def quantized(weight: Array, bits: int = 4) -> QuantizedWeight:
    """One grid a column, as wide as the column."""
    spec = WeightSpec(bits, None)
    low, high = weight.min(axis=0), weight.max(axis=0)
    scales = ((high - low) / spec.top).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, spec.top)
    codes = np.clip(np.rint(weight / scales) + zeros, 0, spec.top)
    return QuantizedWeight(codes.astype(np.uint8), scales[None], zeros.astype(np.uint8)[None], spec)


def solved(seed: int, bias: bool = False) -> tuple[LayerProblem, LayerSolution, Array]:
    """A problem, a rounded solution, and the inputs behind the problem."""
    weight = np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)
    x = activations(200, K, seed)
    problem, codes = LayerProblem(weight, None, stats_of(x)), quantized(weight)
    start = LayerSolution.unsolved(problem)
    record = LayerRecord(200, errors=(3.0, 2.0, 1.0)[: seed + 1], notes=("rounded",))
    correction = x.mean(axis=0) @ (weight - codes.dequantize()) if bias else None
    return problem, replace(start, weight=codes.dequantize(), quantized=codes, bias=correction, changed=True, record=record), x


@pytest.mark.parametrize(("policy", "has_bias", "absorbs"), [("any", False, True), ("existing", False, False), ("existing", True, True)])
def test_which_biases_absorb_the_mean(policy: Any, has_bias: bool, absorbs: bool) -> None:
    assert absorbs_mean(policy, has_bias) == absorbs
    assert not absorbs_mean("none", has_bias)
    assert not absorbs_mean(None, has_bias)
    problem, _, _ = solved(0)
    problem = replace(problem, bias=np.zeros(N) if has_bias else None)
    assert problem.centred(policy) == absorbs
    assert not replace(problem, stats=LayerStats.data_free(K)).centred(policy)


@pytest.mark.parametrize("centred", [False, True])
def test_relative_error_is_that_of_the_outputs(centred: bool) -> None:
    problem, solution, x = solved(0)
    difference = x @ (solution.weight.astype(np.float64) - problem.weight)
    if centred:
        difference -= difference.mean(axis=0)
    expected = np.sqrt(np.square(difference).sum(axis=1).mean() / (x @ problem.weight).var(axis=0).sum())
    assert relative_error(solution.weight, problem, centred) == pytest.approx(expected, rel=1e-4)
    noisy = replace(problem, input_noise=0.01)  # independent of the error of the weights: variances add up
    assert relative_error(solution.weight, noisy, centred) == pytest.approx(np.sqrt(expected**2 + 0.01), rel=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_relative_error_behind_quantized_layers_is_against_the_float_output(centred: bool) -> None:
    problem, solution, x = solved(0)
    y = x + 0.1 * np.random.default_rng(5).standard_normal(x.shape)  # the input as the layers before leave it
    moments = error_feedback.target_moments(problem.weight, y.T @ x / 200, gram_of(x), x.mean(axis=0), 200)
    problem = replace(problem, stats=stats_of(y), target_moments=moments, input_noise=0.01)  # which is in the moments
    wanted = x @ problem.weight.astype(np.float64)
    difference = y @ solution.weight - wanted
    if centred:
        difference -= difference.mean(axis=0)
    expected = np.sqrt(np.square(difference).sum(axis=1).mean() / wanted.var(axis=0).sum())
    assert relative_error(solution.weight, problem, centred) == pytest.approx(expected, rel=1e-4)


def test_the_variance_of_an_output_is_its_mean_square_where_it_is_constant() -> None:
    problem, _, x = solved(0)
    weight, constant = problem.weight, np.repeat(x[:1], 50, axis=0)
    free = LayerStats.data_free(K)
    for stats, expected in (
        (stats_of(x), (x @ weight).var(axis=0).sum()),
        (stats_of(constant), np.square(x[0] @ weight).sum()),
        (free, np.square(weight).sum()),
    ):
        assert output_variance(weight, stats) == pytest.approx(expected, rel=1e-5)
        if not stats.is_data_free:
            moments = error_feedback.target_moments(weight, stats.gram, stats.gram, stats.mean, stats.rows)
            assert output_variance(weight, stats, moments) == pytest.approx(expected, rel=1e-5)
    assert output_variance(0 * weight, stats_of(x)) == 0


def test_relative_error_without_data_is_that_of_the_weights() -> None:
    problem, solution, _ = solved(0)
    problem = replace(problem, stats=LayerStats.data_free(K))
    expected = np.linalg.norm(solution.weight - problem.weight) / np.linalg.norm(problem.weight)
    assert relative_error(solution.weight, problem, False) == pytest.approx(expected, rel=1e-5)
    assert ratio(1.0, 0.0) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_groups_are_the_channels_of_one_layer(bias: bool) -> None:
    """The error is that of all outputs of all groups, each of which sees inputs of its own."""
    parts = [solved(seed, bias) for seed in range(3)]
    problems, solutions = [p for p, _, _ in parts], [s for _, s, _ in parts]
    joined = join_groups(problems, solutions, centred=bias)
    assert joined.quantized is not None
    np.testing.assert_array_equal(joined.weight, np.hstack([s.weight for s in solutions]))
    np.testing.assert_array_equal(joined.quantized.dequantize(), joined.weight)
    errors, variances = [], []
    for problem, solution, x in parts:
        y = x @ problem.weight.astype(np.float64)
        difference = x @ solution.weight + (0 if solution.bias is None else solution.bias) - y
        errors.append(np.square(difference).sum())
        variances.append(np.square(y - y.mean(axis=0)).sum())
    assert joined.record.error == pytest.approx(np.sqrt(sum(errors) / sum(variances)), rel=1e-3)
    assert joined.record.bias_compensated == bias
    assert joined.record.errors == (9.0, 3.0 + 2.0 + 2.0, 3.0 + 2.0 + 1.0)  # the first stopped after the start, the second after a sweep
    assert joined.record.notes == ("rounded",)
    if bias:
        assert joined.bias is not None
        np.testing.assert_array_equal(joined.bias, np.concatenate([s.bias for s in solutions if s.bias is not None]))
    assert QuantizedWeight.side_by_side([s.quantized for s in solutions if s.quantized is not None]).codes.shape == (K, 3 * N)


def solutions() -> dict[str, LayerSolution]:
    problem, rounded, _ = solved(1, True)
    rng = np.random.default_rng(0)
    factors = Factors(rng.standard_normal((K, 2)).astype(np.float32), rng.standard_normal((2, N)).astype(np.float32))
    figures = {"rank": 2, "error_before": np.float64(0.25), "error_after": float("nan")}
    branch = replace(rounded, weight=rounded.weight + factors.product(), factors=factors, record=LayerRecord(3, 0.5, low_rank=figures))
    reduced = replace(LayerSolution.unsolved(problem), weight=problem.weight / 2, changed=True, record=LayerRecord(7, magr={"gap": 0.5}))
    return {"unsolved": LayerSolution.unsolved(problem), "rounded": rounded, "low rank": branch, "reduced": reduced}


@pytest.mark.parametrize("name", solutions())
def test_arrays_give_the_solution_back(name: str) -> None:
    solution = solutions()[name]
    arrays = to_arrays(solution)
    assert sum(a.nbytes for a in arrays.values()) < most_bytes(K, N)
    again = from_arrays(arrays, K, N)
    np.testing.assert_array_equal(again.weight, solution.weight)
    assert (again.bias is None) == (solution.bias is None)
    if solution.bias is not None:
        np.testing.assert_array_equal(again.bias, solution.bias)
    for part in ("codes", "scales", "zero_points") if solution.quantized is not None else ():
        np.testing.assert_array_equal(getattr(again.quantized, part), getattr(solution.quantized, part))
    assert again.changed == solution.changed
    assert repr(again.record) == repr(solution.record).replace("np.float64(0.25)", "0.25")
    assert {n: a.tobytes() for n, a in to_arrays(again).items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize("name", ["codes", "scales", "facts"])
def test_arrays_of_another_layer_are_refused(name: str) -> None:
    arrays = to_arrays(solutions()["rounded"])
    with pytest.raises(ValueError, match="should be"):
        from_arrays(arrays, K, N + 1)
    with pytest.raises(KeyError):
        from_arrays({n: a for n, a in arrays.items() if n != name}, K, N)
    facts = json.loads(arrays["facts"].tobytes())
    for wrong in (facts | {"record": None}, facts | {"record": {"errors": [], "notes": [], "colour": 1}}):
        with pytest.raises(TypeError):
            from_arrays(arrays | {"facts": np.frombuffer(json.dumps(wrong).encode(), np.uint8)}, K, N)
