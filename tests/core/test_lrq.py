"""Learned rounding: against automatic differentiation of the published formula, what it guarantees, the emitted model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import magr_onnx
from magr_onnx.core import types
from magr_onnx.core.grid import stored
from magr_onnx.core.linalg import damped, layer_error
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, comq, lrq, rtn
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from magr_onnx.models import bundled
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.helpers import SPECS, Array, activations, few_samples, gptq_quantized, layer

K, N = 90, 12
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def errors(weights: Array, found: QuantizedWeight, gram: Array) -> Array:
    """The layer error of every column, with a loop."""
    difference = found.dequantize().astype(np.float64) - weights
    return np.array([d @ gram @ d for d in difference.T])


def given(spec: WeightSpec) -> tuple[Array, Array, QuantizedWeight]:
    weights, gram = layer(K, N)
    gram = damped(gram, 0.05)
    return weights, gram, rtn.quantize(weights, gram.diagonal(), spec)


def by_autograd(weights: Array, start: QuantizedWeight, gram: Array, rank: int | None, steps: int) -> Array:
    """E of every iterate and column of the published formula, by torch's derivatives and its Adam, in double precision."""
    import torch

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return torch.round(x)

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            return gradients[0]

    groups = start.spec.group_of_row(len(weights))
    w, h, begin = (torch.from_numpy(np.asarray(a, np.float64)) for a in (weights, gram, start.scales))
    zero = torch.from_numpy(start.zero_points.astype(np.float64))[groups]
    parameters: dict[str, Any] = {"scales": torch.zeros_like(begin)}
    if rank is None:
        parameters["full"] = torch.zeros_like(w)
    else:
        normal = torch.from_numpy(np.random.default_rng(0).standard_normal((K, rank)))
        parameters |= {"a": normal, "b": torch.zeros(rank, N), "r": torch.zeros(K, 1), "c": torch.zeros(1, N)}
    parameters = {name: p.double().requires_grad_() for name, p in parameters.items()}
    rates = {"scales": 1e-3, "full": 2e-3}
    groups_of = [{"params": [p], "lr": rates.get(name, 0.1 / (rank or 1))} for name, p in parameters.items()]
    adam = torch.optim.Adam(groups_of, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / steps)
    found = []
    for _ in range(steps):
        p = parameters
        s = p["full"] * 1 if rank is None else p["a"] @ p["b"] + p["r"] + p["c"]
        s.retain_grad()
        scale = (begin * torch.exp(p["scales"]))[groups]
        codes = torch.clamp(Round.apply(w / (scale * torch.exp(s))) + zero, 0, start.spec.top)
        difference = scale * (codes - zero) - w
        of_columns = (difference * (h @ difference)).sum(dim=0)
        found.append(of_columns.detach().numpy())
        adam.zero_grad()
        of_columns.sum().backward()
        for value in parameters.values():
            value.grad /= s.grad.abs().mean()
        adam.step()
        schedule.step()
    return np.array(found)


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("spec", [WeightSpec(3, 32), WeightSpec(4, None, symmetric=True)], ids=str)
def test_iterates_are_those_of_automatic_differentiation(spec: WeightSpec, rank: int | None) -> None:
    """Few steps: a weight in the middle between two codes may fall either way, and later steps depend on it."""
    weights, gram, start = given(spec)
    steps = 12
    expected = np.minimum.accumulate(by_autograd(weights, start, gram, rank, steps)).sum(axis=1)
    found = lrq.refine(weights, weights, start, gram, rank=rank, iterations=steps).errors
    np.testing.assert_allclose(found[:steps], expected, rtol=1e-3)
    assert expected[-1] < 0.99 * expected[0]


@some_specs
@pytest.mark.parametrize("rank", [8, None])
def test_no_column_ends_above_its_start_and_all_together_well_below(spec: WeightSpec, rank: int | None) -> None:
    weights, gram, start = given(spec)
    found = lrq.refine(weights, weights, start, gram, rank=rank)
    assert (errors(weights, found.weight, gram) <= errors(weights, start, gram) * (1 + 1e-4)).all()
    assert errors(weights, found.weight, gram).sum() < 0.9 * errors(weights, start, gram).sum()
    assert found.errors[-1] == pytest.approx(errors(weights, found.weight, gram).sum(), rel=1e-3)
    assert np.all(np.diff(found.errors) <= 0)
    assert found.sweeps == lrq.ITERATIONS


@some_specs
def test_it_begins_with_the_codes_it_is_given(spec: WeightSpec) -> None:
    """Weights are moved into the steps of these codes, and no further than that."""
    weights, gram, _ = given(spec)
    start = gptq_quantized(weights, gram, spec)
    unmoved = lrq.refine(weights, weights, start, gram, iterations=0).weight
    np.testing.assert_array_equal(unmoved.codes, start.codes)
    np.testing.assert_array_equal(unmoved.scales, start.scales)
    found = lrq.refine(weights, weights, start, gram)
    assert (errors(weights, found.weight, gram) <= errors(weights, start, gram) * (1 + 1e-4)).all()
    rounded = rtn.quantize(weights, gram.diagonal(), spec)
    moved, scales = lrq._moved(weights, start), start.scales[spec.group_of_row(K)]
    np.testing.assert_array_equal(np.clip(np.rint(moved / scales) + start.zero_points[spec.group_of_row(K)], 0, spec.top), start.codes)
    np.testing.assert_allclose(lrq._moved(weights, rounded), weights, atol=0.011 * rounded.scales.max())


@some_specs
def test_the_grid_is_one_the_file_can_hold(spec: WeightSpec) -> None:
    weights, gram, start = given(spec)
    found = lrq.refine(weights, weights, start, gram).weight
    np.testing.assert_array_equal(found.scales, stored(found.scales, spec))
    np.testing.assert_array_equal(found.zero_points, start.zero_points)
    assert found.codes.max() <= spec.top
    assert not np.array_equal(found.scales, start.scales)


def test_errors_of_inputs_that_are_alike_cancel() -> None:
    """Where all inputs are nearly the same one, only the sum of a column counts, and nearest codes leave about sqrt(K / 12) steps."""
    weights = np.random.default_rng(0).uniform(-1, 1, (64, 8)).astype(np.float32)
    gram = np.ones((64, 64)) + 1e-3 * np.eye(64)
    start = rtn.quantize(weights, gram.diagonal(), WeightSpec(3, None))
    found = lrq.refine(weights, weights, start, gram).weight
    left = [float(np.abs((weight.dequantize() - weights).sum(axis=0)).max()) for weight in (start, found)]
    assert left[1] < 0.1 * left[0]


def test_layers_of_many_columns_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gram, start = given(WeightSpec(3, 32))
    monkeypatch.setattr(types, "COLUMN_BYTES", 4 * K * 5)
    found = lrq.refine(weights, weights, start, gram)
    parts = [lrq.refine(weights[:, c], weights[:, c], start.columns(c), gram) for c in types.column_parts(K, N)]
    assert len(parts) == 3
    np.testing.assert_array_equal(found.weight.codes, np.hstack([part.weight.codes for part in parts]))
    assert found.errors[-1] == pytest.approx(sum(part.errors[-1] for part in parts))


def test_it_is_deterministic_and_leaves_its_arguments_as_they_are() -> None:
    weights, gram, start = given(WeightSpec(3, 32))
    before = weights.copy(), gram.copy(), start.codes.copy(), start.scales.copy()
    one, other = (lrq.refine(weights, weights, start, gram).weight for _ in range(2))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)
    for kept, now in zip(before, (weights, gram, start.codes, start.scales), strict=True):
        np.testing.assert_array_equal(kept, now)


@pytest.mark.parametrize("begin", ["rtn", "gptq", "comq"])
def test_options_reach_it(begin: str) -> None:
    x = activations(400, K)
    weights, _ = layer(K, N)
    problem = Problem(weights, weights, LayerStats(x.T @ x / 400, x.mean(axis=0), 400), False, WeightSpec(3, 32))
    told = Options(method_options={"lrq_start": begin, "lrq_iterations": 40, "lrq_rank": 0})
    found, start = QUANTIZERS["lrq"].run(problem, told), QUANTIZERS[begin].run(problem, Options())
    assert found.figures["iterations"] == 40
    damped_gram = problem.damped_gram(problem.damping(told))
    of_start, of_found = (layer_error(s.weight.dequantize() - weights, damped_gram) for s in (start, found))
    assert found.figures["error_start"] == pytest.approx(of_start, rel=1e-3)
    assert found.figures["error"] == pytest.approx(of_found, rel=1e-3)
    assert of_found <= of_start * (1 + 1e-5)
    usual = QUANTIZERS["lrq"].run(problem, Options())
    assert usual.figures["iterations"] == lrq.ITERATIONS


def test_coordinate_descent_is_better() -> None:
    """As the documentation says: at the same grid, with scales that both refit."""
    for spec in SPECS:
        weights, gram, start = given(spec)
        learned, descended = lrq.refine(weights, weights, start, gram).weight, comq.refine(weights, start, gram).weight
        assert errors(weights, descended, gram).sum() < errors(weights, learned, gram).sum()


def test_without_data_it_rounds_to_nearest() -> None:
    weights, _ = layer(K, N)
    problem = Problem(weights, weights, LayerStats.data_free(K), False, WeightSpec(4, 32))
    found, nearest = (QUANTIZERS[name].run(problem, Options()).weight for name in ("lrq", "rtn"))
    np.testing.assert_array_equal(found.codes, nearest.codes)


@pytest.mark.parametrize("told", [{}, {"lrq_rank": 0, "lrq_iterations": 80}, {"lrq_start": "gptq", "block_size": None}], ids=str)
def test_the_written_file_computes_what_the_report_says(told: dict[str, Any]) -> None:
    """By onnxruntime, nearer to the float model's outputs than the nearest codes of the same grids."""
    source, x = graphs.chain(), activations(400, 48).astype(np.float32)
    given = {"bits": 3, "alpha": 0.0, "block_size": told.get("block_size", 16), "accuracy_level": 0}
    outputs = []
    for options in ({"quantizer": "lrq"} | told, {"quantizer": "rtn"}, None):
        made = source if options is None else magr_onnx.optimize(source, {"x": x}, **{**options, **given}).model
        with Session(made) as session:
            outputs.append(session.run({"x": x[:64]})[0].astype(np.float64))
    ours, nearest = (float(np.square(y - outputs[2]).sum()) for y in outputs[:2])
    assert ours < 0.9 * nearest


def test_options_of_the_command_line_reach_it() -> None:
    source, x = graphs.chain(), activations(400, 48).astype(np.float32)
    usual: dict[str, Any] = {"quantizer": "lrq", "bits": 3, "alpha": 0.0, "block_size": 16}
    told: list[dict[str, Any]] = [{}, {"lrq_rank": 0}, {"lrq_rank": 2}, {"lrq_iterations": 3}, {"lrq_start": "gptq"}]
    found = [magr_onnx.optimize(source, {"x": x}, **usual, **options) for options in told]
    errors = {tuple(row.error for row in report.layers) for _, report in found}
    assert len(errors) == len(told)
    assert found[3].report.layers[0].solver == pytest.approx({**found[3].report.layers[0].solver, "iterations": 3})


@pytest.mark.slow
def test_bundled_model() -> None:
    data = [{name: array[:4] for name, array in batch.items()} for batch in few_samples()]
    some = {"bits": 3, "alpha": 0.0, "include": ["*MatMul_7"], "validation_data": data[:1]}
    reports = [magr_onnx.optimize(bundled.MODEL, data, quantizer=name, **some).report for name in ("lrq", "rtn")]
    (learned,), (nearest,) = (report.layers for report in reports)
    assert reports[0].verified == 1
    assert learned.solver is not None
    assert learned.solver["iterations"] == lrq.ITERATIONS
    assert learned.error < nearest.error


def test_it_knows_no_accumulators() -> None:
    with pytest.raises(magr_onnx.OptionError, match="lrq knows no accumulators"):
        magr_onnx.optimize("no such file", quantizer="lrq", format="qdq-int8", target="generic")
