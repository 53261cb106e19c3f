"""Refitting the grids of groups together with their codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from magr_onnx.core.grid import ladder, search
from magr_onnx.core.linalg import column_errors, damped
from magr_onnx.core.quantizers import comq, gptq, rtn
from magr_onnx.core.quantizers.grid_refinement import SHRINKS, regrid
from magr_onnx.core.types import QuantizedWeight, WeightSpec
from tests.helpers import Array, gptq_quantized, layer

pytestmark = pytest.mark.usefixtures("each_backend")

K, N = 96, 24
SPECS = [
    WeightSpec(2, 32),
    WeightSpec(3, 20),
    WeightSpec(4, None),
    WeightSpec(2, 16, symmetric=True),
    WeightSpec(3, 32, scale_dtype="float16"),
    WeightSpec(8, 32),
]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def errors(weight: QuantizedWeight, target: Array, gram: Array) -> Array:
    return column_errors(weight.dequantize().astype(np.float64) - target, gram)


def refit(target: Array, weight: QuantizedWeight, gram: Array) -> QuantizedWeight:
    found, gain = regrid(target, weight, gram.astype(np.float32))
    before, after = (errors(w, target, gram).sum() for w in (weight, found))
    assert before - gain == pytest.approx(after, rel=1e-2, abs=1e-5 * before)
    return found


@some_specs
@pytest.mark.parametrize("seed", [0, 1])
def test_no_column_gets_worse(spec: WeightSpec, seed: int) -> None:
    target, gram = layer(K, N, seed)
    gram = damped(gram, 0.05)
    plain = search(target, spec, gram.diagonal())
    refined = comq.refine(target, gptq_quantized(target, gram, spec), gram, sweeps=4).weight
    for start in (plain.weight(plain.codes(target)), refined):
        found = refit(target, start, gram)
        before, after = errors(start, target, gram), errors(found, target, gram)
        assert (after <= before * (1 + 1e-4)).all()
        assert found.spec == spec
        assert max(found.codes.max(), found.zero_points.max()) <= spec.top
        assert (found.scales > 0).all()
        np.testing.assert_array_equal(found.scales, found.scales.astype(spec.scale_dtype).astype(np.float32))
        if spec.symmetric:
            assert (found.zero_points == spec.middle).all()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size], ids=str)
def test_it_goes_where_sweeps_and_scale_refits_do_not(spec: WeightSpec) -> None:
    """Between sweeps it is worth more than sweeps alone, over some layers, and from rounded weights it moves zero points."""
    alone = between = moved = 0.0
    for seed in range(4):
        target, gram = layer(K, N, seed)
        gram = damped(gram, 0.05)
        start = comq.refine(target, gptq_quantized(target, gram, spec), gram, sweeps=4).weight
        found = refit(target, start, gram)
        alone += errors(comq.refine(target, start, gram, sweeps=4).weight, target, gram).sum()
        between += errors(comq.refine(target, found, gram, sweeps=4).weight, target, gram).sum()
        nearest = rtn.quantize(target, gram.diagonal(), spec)
        moved += (refit(target, nearest, gram).zero_points != nearest.zero_points).sum()
    assert between < alone
    assert spec.symmetric or moved


def test_a_single_group_is_gptq_on_the_best_grid_of_the_ladder() -> None:
    """One group, so the weights that make up for others are the target: every grid of its ladder, rounded by GPTQ, is a candidate.

    Rows come in the order of their importance.
    """
    spec = WeightSpec(3, None)
    target, gram = layer(24, N)
    gram = damped(gram, 0.05)
    order = np.argsort(-np.sqrt(gram.diagonal()) * np.linalg.norm(target, axis=1))
    target, gram = target[order], gram[np.ix_(order, order)]
    poor = QuantizedWeight(np.zeros((24, N), np.uint8), np.ones((1, N), np.float32), np.zeros((1, N), np.uint8), spec)
    poor = comq.refine(target, poor, gram, sweeps=1, rescale=False).weight
    found = errors(refit(target, poor, gram), target, gram)
    feedback = gptq.prepare(gram, 0.0, act_order=False)
    best = np.full(N, np.inf)
    for scale, zero in zip(*ladder(target, spec, SHRINKS), strict=True):
        grid = search(target, spec, gram.diagonal())
        grid = type(grid)(scale[None], zero[None], spec, 24)
        best = np.minimum(best, errors(gptq.solve(target, feedback, grid), target, gram))
    np.testing.assert_allclose(found, best, rtol=0.02)


def test_close_to_the_best_codes_there_are() -> None:
    """All codes of six rows at 2 bits, on every grid of the ladder, by brute force."""
    spec = WeightSpec(2, None)
    rows, n = 6, 12
    target, gram = layer(rows, n)
    gram = damped(gram, 0.1)
    start = search(target, spec, gram.diagonal())
    found = errors(comq.refine(target, refit(target, start.weight(start.codes(target)), gram), gram, rescale=False).weight, target, gram)
    codes = np.array(list(itertools.product(range(4), repeat=rows)), np.float64).T  # (rows, 4^rows)
    best = np.full(n, np.inf)
    for scale, zero in zip(*ladder(target, spec, SHRINKS), strict=True):
        for j in range(n):
            difference = (codes - zero[j]) * scale[j] - target[:, j, None]
            best[j] = min(best[j], float(column_errors(difference, gram).min()))
    assert found.sum() < 1.25 * best.sum()
    assert np.median(found / best) < 1.1


def test_a_group_already_right_stays() -> None:
    """On the grid already: nothing to gain."""
    spec = WeightSpec(3, 32)
    target, gram = layer(K, N)
    grid = search(target, spec, gram.diagonal())
    start = grid.weight(grid.codes(target))
    found = refit(start.dequantize(), start, damped(gram, 0.05))
    np.testing.assert_allclose(found.dequantize(), start.dequantize(), atol=1e-5 * np.abs(target).max())


def test_groups_whose_gram_matrix_is_hardly_definite_are_refitted_all_the_same() -> None:
    """Patches of a smooth image: nine nearly equal inputs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 1)) + 1e-5 * rng.standard_normal((200, 9))
    gram = (x.T @ x / 200).astype(np.float32)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(gram.astype(np.float64))
    target = rng.standard_normal((9, 4)).astype(np.float32)
    start = rtn.quantize(target, gram.diagonal(), WeightSpec(3, None))
    found = refit(target, start, gram)
    assert found.codes.shape == target.shape
    wide = np.full((9, 9), 1.0)  # what such a matrix is in the limit
    assert errors(found, target, wide).sum() <= errors(start, target, wide).sum() * 1.01
