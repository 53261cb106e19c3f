"""Layers in which something is zero, constant or all but zero: every quantizer divides by no power, scale or norm that may be 0."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from magr_onnx.core import error_feedback, low_rank, magr
from magr_onnx.core.histograms import sketch
from magr_onnx.core.layer import LayerProblem, relative_error
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.moments import with_folds
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, batched, cross_validation, rtn
from magr_onnx.core.types import LayerStats, WeightSpec
from tests.helpers import Array, gram_of

K, N, GROUP = 24, 8, 8
DEAD, ZERO = slice(8, 18), slice(0, 5)  # inputs: one group and a part of the next; columns
KINDS = (
    "dead inputs",
    "dead inputs, zero columns",
    "zero columns",
    "zero groups",
    "zero weights",
    "zero inputs",
    "zero everything",
    "constant columns",
    "constant inputs",
    "faint inputs",
    "faint inputs, small columns",
    "tiny column",
    "tiny everything",
    "huge everything",
)
kinds = pytest.mark.parametrize("kind", KINDS)


def degenerate(kind: str, rows: int, folds: int = 1) -> tuple[Array, LayerStats]:
    """A weight ``(K, N)``, and statistics of so many rows, with quarters held out; data-free for none."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((K, N)).astype(np.float32)
    x = rng.standard_normal((max(rows, 1), K)).astype(np.float32)
    if "dead inputs" in kind:
        x[:, DEAD] = 0
    if "zero columns" in kind:
        weights[:, ZERO] = 0
    if kind in ("zero weights", "zero everything"):
        weights[:] = 0
    if kind in ("zero inputs", "zero everything"):
        x[:] = 0
    if kind == "zero groups":
        weights[GROUP : 2 * GROUP] = 0
    if kind == "constant columns":
        weights[:, ZERO] = 0.5
    if kind == "constant inputs":
        x[:, DEAD] = 2
    if "faint inputs" in kind:  # powers that float32 holds, and does not hold times a scale
        x[:, DEAD] *= np.float32(1e-20)
    if "small columns" in kind:
        weights[:, ZERO] *= np.float32(1e-4)
    if kind == "tiny column":
        weights[:, 0] *= np.float32(1e-36)
        x *= np.float32(1e-3)
    if kind == "tiny everything":
        weights *= np.float32(1e-30)
        x *= np.float32(1e-15)
    if kind == "huge everything":
        weights *= np.float32(1e12)
        x *= np.float32(1e6)
    if rows < 4:
        return weights, LayerStats(gram_of(x), x.mean(axis=0), rows) if rows else LayerStats.data_free(K)
    return weights, with_folds([LayerStats(gram_of(part), part.mean(axis=0), len(part)) for part in np.split(x, 4)], folds)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """Warnings are errors in every test; here they also say which division it was."""
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield


def budgets(name: str, spec: WeightSpec) -> list[Budget | None]:
    supports = QUANTIZERS[name].accumulators
    bounds = [Budget(Accumulator(12)), Budget(Accumulator(16, 2), -128, 127)] if supports != "none" and spec.group_size is None else []
    return [*bounds] if supports == "only" else [None, *bounds]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("kind", "rows"), [(k, rows) for k in KINDS for rows in (0, 1, 40) if rows or "inputs" not in k])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_quantizer_solves_degenerate_layers(name: str, kind: str, rows: int, bits: int, symmetric: bool) -> None:
    weights, stats = degenerate(kind, rows)
    for group, centred, damping in ((None, False, None), (GROUP, True, None), (GROUP, False, 0.0)):
        spec = WeightSpec(bits, group, symmetric, "float16" if bits == 2 else "float32")
        for budget in budgets(name, spec):
            problem = Problem(weights, weights, stats, centred, spec, budget)
            solution = QUANTIZERS[name].run(problem, Options(damping=damping))
            weight = solution.weight.dequantize()
            assert max(solution.weight.codes.max(), solution.weight.zero_points.max()) <= spec.top
            assert np.isfinite(weight).all()
            assert np.isfinite([*solution.errors, *solution.figures.values()]).all()
            assert (weight[:, ~weights.any(axis=0)] == 0).all()  # columns of zeros are zeros on any grid
            if budget is None and kind.startswith("dead inputs") and name != "hqq":  # which minimises another error
                nearest = rtn.quantize(weights, problem.gram.diagonal(), spec).dequantize()
                errors = [layer_error((w - weights).astype(np.float64), problem.gram) for w in (weight, nearest)]
                assert errors[0] <= errors[1] * (1.02 if name == "gptq" else 1 + 1e-5)  # gptq is greedy: most often, not always, less


@pytest.mark.parametrize("name", [name for name, quantizer in QUANTIZERS.items() if quantizer.accumulators != "only"])
@kinds
@pytest.mark.parametrize("folds", [1, 4])
def test_degenerate_layers_are_cross_validated(name: str, kind: str, folds: int) -> None:
    weights, stats = degenerate(kind, 40, folds)
    for centred in (False, True):
        spec = WeightSpec(4, GROUP)
        solution = cross_validation.run(QUANTIZERS[name], Problem(weights, weights, stats, centred, spec), Options())
        assert np.isfinite(solution.weight.dequantize()).all()
        assert solution.held_out is not None
        assert np.isfinite(solution.held_out)


@kinds
@pytest.mark.parametrize("group", [None, GROUP])
def test_weights_of_dead_inputs_are_rounded(kind: str, group: int | None) -> None:
    """No error is seen there, and none is made beyond half a step of the grid, but for what is clipped."""
    weights, stats = degenerate(kind, 40)
    dead = stats.gram.diagonal() == 0
    for name in ("gptq", "comq"):
        quantized = QUANTIZERS[name].run(Problem(weights, weights, stats, False, WeightSpec(4, group)), Options()).weight
        groups = quantized.spec.group_of_row(K)
        scales, zeros = quantized.scales[groups], quantized.zero_points[groups].astype(np.float32)
        clipped = np.clip(weights, -zeros * scales, (quantized.spec.top - zeros) * scales)
        assert (np.abs(quantized.dequantize() - clipped)[dead] <= 0.5001 * scales[dead]).all()


@kinds
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_convolutions_may_be_degenerate(kind: str, symmetric: bool) -> None:
    weights, stats = degenerate(kind, 40)
    spec = WeightSpec(4, None, symmetric)
    grams = np.stack([stats.gram, 0 * stats.gram, np.eye(K)])
    for damping in (0.0, 0.01):
        solved = batched.solve(np.stack([weights, weights, 0 * weights]), grams, spec, damping)
        assert np.isfinite(solved.errors).all()
        assert not solved.weights[2].dequantize().any()


@kinds
@pytest.mark.parametrize("method", ["fista", "authors"])
@pytest.mark.parametrize("relative", [False, True])
def test_magr_of_degenerate_layers(kind: str, method: magr.Method, relative: bool) -> None:
    weights, stats = degenerate(kind, 40)
    for group in (None, GROUP):
        reduction = magr.reduce(weights, stats.gram, alpha=1e-2, relative=relative, group_size=group, method=method)
        assert np.isfinite(reduction.weights).all()
        assert np.isfinite([reduction.gap, reduction.objective, reduction.start]).all()


@kinds
@pytest.mark.parametrize("folds", [1, 4])
def test_other_steps_of_degenerate_layers(kind: str, folds: int) -> None:
    weights, stats = degenerate(kind, 40, folds)
    parts = (*stats.folds, *([stats.without(0)] if folds == 1 else []))
    moments = with_folds([error_feedback.target_moments(weights, p.gram, p.gram, p.mean, p.rows) for p in parts], folds)
    nearest = rtn.quantize(weights, stats.gram.diagonal(), WeightSpec(4, GROUP))
    for centred in (False, True):
        assert np.isfinite(error_feedback.solve_target(weights, stats, moments, centred).weights).all()
        for target_moments in (None, moments):
            problem = LayerProblem(weights, None, stats, target_moments=target_moments)
            assert np.isfinite(relative_error(nearest.dequantize(), problem, centred))
    for root in ("exact", "diagonal"):
        factors = low_rank.reconstruct(weights - nearest.dequantize(), low_rank.root(stats.gram, 0.1, root), 3)
        assert np.isfinite(factors.product()).all()
    assert sketch(weights, nearest.dequantize(), nearest)["of"] == weights.size
