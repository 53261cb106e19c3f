"""Compiled loops against what they compute, in float64, and whole solvers against their loops in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from magr_onnx.core import compiled, grid, magr
from magr_onnx.core.gram import RowGram
from magr_onnx.core.prox import levels
from magr_onnx.core.quantizers import QUANTIZERS, comq, gptq
from magr_onnx.core.quantizers.grid_refinement import regrid
from magr_onnx.core.quantizers.interface import Options, Problem
from magr_onnx.core.types import Array, LayerStats, QuantizedWeight, WeightSpec

pytest.importorskip("numba")
from magr_onnx.core.compiled import grids, reduction, rounding

N = 150  # more than a loop does at a time, and no multiple of it


def layer(k: int, n: int, seed: int = 0) -> tuple[Array, Array]:
    """Weights ``(k, n)`` and a Gram matrix of correlated inputs ``(k, k)``, both float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * k, k)) + 0.7 * rng.standard_normal((3 * k, 4)) @ rng.standard_normal((4, k))
    x[:, 0] *= 8
    return rng.standard_normal((k, n)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def error(difference: Array, gram: Array) -> Array:
    """``d^T H d`` of every column."""
    d, h = difference.astype(np.float64), gram.astype(np.float64)
    result: Array = np.einsum("kn,kn->n", d, h @ d)
    return result


def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Go through the kinds of loops."""
    for kind in ("compiled", "NumPy"):
        monkeypatch.setattr(compiled, "serves", lambda k, n, backend=None, kind=kind: kind == "compiled")
        yield kind


@pytest.mark.parametrize("p", [1, 7, 32, 45])
@pytest.mark.parametrize("refit", [False, True])
def test_rows_move_to_their_least_error(p: int, refit: bool) -> None:
    w, h = layer(p, N)
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.1, 0.3, N).astype(np.float32)
    low, high = np.full(N, -8, np.float32), np.full(N, 7, np.float32)
    codes = np.clip(np.rint(w / scale + rng.uniform(-1, 1, w.shape)), -8, 7).astype(np.float32)
    before = codes.copy()
    residual = (h @ (w - scale * codes)).astype(np.float32)
    change, sums = np.full_like(w, np.nan), np.full((3, N), np.nan)
    rounding.move_rows(h, residual, codes, scale, low, high, change, sums, refit)
    expected = before.astype(np.float64)
    for row in range(p):  # the exact minimiser of each row, given all others
        r = h[row].astype(np.float64) @ (w - scale * expected)
        expected[row] = np.clip(np.rint(expected[row] + r / (h[row, row] * scale)), -8, 7)
    assert (codes != expected).mean() < 0.01  # ties
    np.testing.assert_allclose(change, scale * (codes - before), atol=1e-6)
    np.testing.assert_allclose(residual, h.astype(np.float64) @ (w - scale * codes), atol=1e-3 * np.abs(residual).max())
    decrease = error(w - scale * before, h) - error(w - scale * codes, h)
    np.testing.assert_allclose(sums[0], decrease, atol=1e-4 * decrease.max())
    if refit:
        np.testing.assert_allclose(sums[1], np.einsum("kn,kn->n", codes, h @ (w - scale * codes)), atol=1e-3 * np.abs(sums[1]).max())
        np.testing.assert_allclose(sums[2], error(codes, h), rtol=1e-4)


def test_inputs_that_were_never_active_do_not_move() -> None:
    w, h = layer(12, N)
    h[5], h[:, 5] = 0, 0
    codes, change, sums = np.zeros_like(w), np.empty_like(w), np.empty((3, N))
    limit = np.full(N, 7, np.float32)
    rounding.move_rows(h, h @ w, codes, np.full(N, 0.2, np.float32), -limit, limit, change, sums, False)
    assert not codes[5].any()
    assert not change[5].any()
    assert codes[6].any()


@pytest.mark.parametrize("g", [8, 33])
def test_the_best_grid_of_a_group_is_found(g: int) -> None:
    w, h = layer(g, N)
    scales = np.random.default_rng(2).uniform(0.15, 0.5, (5, N)).astype(np.float32)
    zeros = np.full((5, N), 8, np.float32)
    upper = np.linalg.cholesky(h[::-1, ::-1].astype(np.float64))[::-1, ::-1]
    feedback, power = (upper / np.diag(upper)).T.astype(np.float32), np.square(np.diag(upper)).astype(np.float32)
    loss, best, codes = np.full(N, np.inf), np.empty(N, np.intp), np.empty_like(w)
    rounding.best_grids(w, np.ascontiguousarray(feedback), power, scales, zeros, 15, loss, best, codes)
    spec, of_grids = WeightSpec(4, None), []
    for scale, zero in zip(scales, zeros, strict=True):  # GPTQ on each of them
        weight = gptq.solve(w, gptq.Feedback(np.tril(feedback, -1), np.arange(g), 0.0), grid.Grid(scale[None], zero[None], spec, g))
        of_grids.append(error(weight.dequantize() - w, h))
    np.testing.assert_allclose(error(scales[best, np.arange(N)] * codes - w, h), loss, rtol=1e-3)
    np.testing.assert_allclose(loss, np.min(of_grids, axis=0), rtol=0.05)  # but for ties
    assert np.median(loss / np.min(of_grids, axis=0)) == pytest.approx(1, rel=1e-3)
    again, none = loss.copy(), best.copy()
    rounding.best_grids(w, np.ascontiguousarray(feedback), power, scales, zeros, 15, again, none, codes)
    assert (none == -1).all()
    assert (again == loss).all()


def test_losses_and_fits_of_grids() -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((3, 10, 300)).astype(np.float32)
    importance = rng.uniform(0.5, 2, (3, 10)).astype(np.float32)
    scales = rng.uniform(0.1, 0.5, (4, 3, 300)).astype(np.float32)
    zeros = rng.integers(3, 12, scales.shape).astype(np.float32)
    found, products = np.empty_like(scales), np.empty((2, 3, 300), np.float32)
    grids.losses(w, importance, scales, zeros, 15, found)
    grids.fits(w, importance, scales[1], zeros[1], 15, products)
    rounded = np.clip(np.rint(w / scales[:, :, None]), -zeros[:, :, None], 15 - zeros[:, :, None])
    expected = np.einsum("gr,sgrn->sgn", importance, np.square(scales[:, :, None] * rounded - w, dtype=np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(
        products[0], np.einsum("gr,grn->gn", importance, rounded[1] * (w / scales[1][:, None])), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(products[1], np.einsum("gr,grn->gn", importance, rounded[1] ** 2), rtol=1e-3)


@pytest.mark.parametrize("threshold", [0.05, 3.0, 1e4])
def test_a_step_of_magr(threshold: float) -> None:
    rng = np.random.default_rng(4)
    metric = rng.uniform(0.5, 2, (3, 16)).astype(np.float32)
    inverse = 1 / metric.reshape(-1)
    x, product, before = rng.standard_normal((3, N, 48)).astype(np.float32)
    momentum = rng.choice([0, 0.95], N).astype(np.float32)
    point = x - product * inverse
    extrapolated = point + momentum[:, None] * (point - before)
    level = levels(extrapolated.reshape(N, 3, 16), threshold, metric)
    expected = np.clip(extrapolated.reshape(N, 3, 16), -level[..., None], level[..., None]).reshape(N, 48)
    for start in (np.zeros_like(level), 0.97 * level, 1.5 * level + 1):  # without one, left of the root, right of it
        moved, points, found = x.copy(), product.copy(), start.astype(np.float32)
        reduction.step(moved, points, before.copy(), momentum, inverse, metric, found, threshold)
        np.testing.assert_allclose(found, level, atol=1e-5)
        np.testing.assert_allclose(moved, expected, atol=1e-5)
        np.testing.assert_allclose(points, point, atol=1e-6)


@pytest.mark.parametrize("spec", [WeightSpec(4, 32), WeightSpec(3, None, True), WeightSpec(2, 20, False, "float16")], ids=str)
@pytest.mark.parametrize("few", [False, True], ids=["dense", "few rows"])
def test_solvers_end_where_those_in_numpy_do(spec: WeightSpec, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps but for rounding errors of sums, so that some ties are resolved otherwise."""
    k = 1040 if few else 90
    w, h = layer(90, N)
    gram = RowGram.of(np.random.default_rng(5).standard_normal((60, k)).astype(np.float32)).plus_diagonal(3.0) if few else h
    weights = np.random.default_rng(6).standard_normal((k, N)).astype(np.float32) if few else w
    monkeypatch.setattr(compiled, "CHANNELS", 64)
    ends: dict[str, list[float]] = {}
    for kind in both(monkeypatch):
        chosen = grid.search(weights, spec, gram.diagonal())
        start = gptq.solve(weights, gptq.prepare(gram, 0.1), chosen)
        refined = comq.refine(weights, start, gram.astype(np.float32), sweeps=3, tolerance=0.0)
        steps: list[QuantizedWeight] = [chosen.weight(chosen.codes(weights)), start, refined.weight]
        if not few and spec.rows(k) <= 64:
            better = regrid(weights, refined.weight, gram)
            steps.append(better.weight)
            lower = refined.errors[-1] - better.gain
            assert lower == pytest.approx(float(error(better.weight.dequantize() - weights, h).sum()), rel=1e-3)
        dense = gram if isinstance(gram, np.ndarray) else gram.dense()
        ends[kind] = [float(error(step.dequantize() - weights, dense).sum()) for step in steps]
        assert refined.errors[-1] == pytest.approx(ends[kind][2], rel=1e-3)
        ends[kind].append(magr.reduce(weights, gram, alpha=1e-3, group_size=spec.group_size).objective)
    np.testing.assert_allclose(ends["compiled"], ends["NumPy"], rtol=0.02)


def test_a_layer_is_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default quantizer; in parts of its output channels, each of which ends its descent for itself."""
    w, h = layer(90, 400)
    problem = Problem(w, w, LayerStats(h.astype(np.float64), np.zeros(90), 500), False, WeightSpec(3, 30))
    errors = {}
    monkeypatch.setattr(compiled, "CHANNELS", 64)
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 1)
    for kind in both(monkeypatch):
        solution = QUANTIZERS["auto"].run(problem, Options())
        errors[kind] = float(error(solution.weight.dequantize() - w, h).sum())
        assert solution.errors[-1] < solution.errors[0]
    assert errors["compiled"] == pytest.approx(errors["NumPy"], rel=0.01)


def test_shapes_decide_and_not_cores() -> None:
    assert compiled.available()
    assert compiled.serves(256, 128)
    assert not compiled.serves(255, 128)
    assert not compiled.serves(1 << 20, 63)
    parts = compiled.by_columns(lambda part: part, 100, 5000)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 5000)
    assert all(compiled.serves(100, part.stop - part.start) for part in parts)
    assert len(compiled.by_columns(lambda part: part, 4096, 4096)) == 8
