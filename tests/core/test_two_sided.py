"""Rounding under a two-sided Hessian."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from magr_onnx.core.grid import search
from magr_onnx.core.linalg import damped
from magr_onnx.core.quantizers import comq, gptq, two_sided
from magr_onnx.core.types import QuantizedWeight, WeightSpec
from tests.helpers import Array, gptq_quantized, layer

K, N = 96, 40
SPECS = [WeightSpec(2, 32), WeightSpec(3, None), WeightSpec(4, 20, symmetric=True), WeightSpec(3, 32, scale_dtype="float16")]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def moments(n: int = N, seed: int = 0, factors: int = 6) -> Array:
    """Second moments of correlated gradients, of powers over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((4 * n, factors)) @ rng.standard_normal((factors, n)) + 0.3 * rng.standard_normal((4 * n, n))
    g *= np.exp(rng.standard_normal(n))
    product: Array = g.T @ g / len(g)
    return product


def solved(
    weights: Array, gram: Array, outputs: Array, spec: WeightSpec, sweeps: int = 8
) -> tuple[QuantizedWeight, QuantizedWeight, tuple[float, ...]]:
    """The first pass, and what is left of it."""
    blocks = two_sided.blocks_of(outputs)
    grid = search(weights, spec, gram.diagonal())
    start = two_sided.solve(weights, gptq.prepare(gram, 0.0), grid, outputs, blocks)
    return start, *two_sided.refine(weights, start, gram, outputs, blocks, sweeps=sweeps)


def energy(weight: QuantizedWeight, target: Array, gram: Array, outputs: Array) -> float:
    difference = weight.dequantize().astype(np.float64) - target
    return float(np.trace(outputs @ difference.T @ gram @ difference))


def test_energy_is_that_of_the_kronecker_product() -> None:
    rng = np.random.default_rng(0)
    difference, (_, gram), outputs = rng.standard_normal((7, 5)), layer(7, 5), moments(5)
    flat = difference.T.reshape(-1)  # columns one after the other
    assert two_sided.energy(difference, gram, outputs) == pytest.approx(float(flat @ np.kron(outputs, gram) @ flat))


@some_specs
def test_energy_never_rises(spec: WeightSpec) -> None:
    weights, gram = layer(K, N)
    gram, outputs = damped(gram, 0.05), two_sided.damped_outputs(moments())
    start, found, errors = solved(weights, gram, outputs, spec)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]
    assert errors[0] == pytest.approx(energy(start, weights, gram, outputs), rel=1e-3)
    assert errors[-1] == pytest.approx(energy(found, weights, gram, outputs), rel=1e-3)
    for weight in (start, found):
        assert weight.spec == spec
        assert max(weight.codes.max(), weight.zero_points.max()) <= spec.top
        np.testing.assert_array_equal(weight.scales, weight.scales.astype(spec.scale_dtype).astype(np.float32))
        if spec.symmetric:
            assert (weight.zero_points == spec.middle).all()


@some_specs
def test_energy_never_rises_where_a_block_moves_as_one(spec: WeightSpec) -> None:
    """Gradients of all outputs nearly the same: every column of a block would mend the same error, and together too much of it."""
    n = 160
    weights, gram = layer(K, n)
    gram, outputs = damped(gram, 0.05), np.ones((n, n)) + 0.01 * np.eye(n)
    _, found, errors = solved(weights, gram, outputs, spec)
    assert all(after <= before * (1 + 1e-3) for before, after in pairwise(errors))
    assert errors[-1] == pytest.approx(energy(found, weights, gram, outputs), rel=0.02)


@some_specs
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_less_energy_than_columns_by_themselves(spec: WeightSpec, seed: int) -> None:
    weights, gram = layer(K, N, seed)
    gram, outputs = damped(gram, 0.05), two_sided.damped_outputs(moments(seed=seed))
    alone = comq.refine(weights, gptq_quantized(weights, gram, spec, damping=0.0), gram, sweeps=8).weight
    _, found, _ = solved(weights, gram, outputs, spec)
    assert energy(found, weights, gram, outputs) < 0.92 * energy(alone, weights, gram, outputs)


@some_specs
def test_uncoupled_outputs_are_solved_as_columns_by_themselves(spec: WeightSpec) -> None:
    """M = I: the first pass is GPTQ, code for code, and the sweeps end near coordinate descent's."""
    weights, gram = layer(K, N)
    gram, outputs = damped(gram, 0.05), np.eye(N)
    start, found, _ = solved(weights, gram, outputs, spec, sweeps=4)
    expected = gptq_quantized(weights, gram, spec, damping=0.0)
    np.testing.assert_array_equal(start.codes, expected.codes)
    refined = comq.refine(weights, expected, gram, sweeps=4).weight
    assert energy(found, weights, gram, outputs) == pytest.approx(energy(refined, weights, gram, outputs), rel=0.03)


def test_blocks_are_all_columns_once_strongest_first() -> None:
    for n in (5, 16, 40):
        outputs = moments(n)
        order = np.concatenate(two_sided.blocks_of(outputs))
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
        assert (np.diff(outputs.diagonal()[order]) <= 0).all()


def test_damping_keeps_proportions_and_makes_definite() -> None:
    outputs = moments()
    outputs[3] = outputs[:, 3] = 0
    found = two_sided.damped_outputs(outputs)
    assert found.diagonal().mean() == pytest.approx(1)
    assert np.linalg.eigvalsh(found)[0] > 0.05
    np.testing.assert_allclose(found, two_sided.damped_outputs(1e-9 * outputs), rtol=1e-9)
    ratio = (found / np.where(outputs == 0, 1, outputs))[~np.eye(N, dtype=bool) & (outputs != 0)]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert np.array_equal(two_sided.damped_outputs(np.zeros((4, 4))), np.eye(4))


@some_specs
def test_outputs_without_gradients_stay_sane(spec: WeightSpec) -> None:
    """They may give way to others, but not run away."""
    weights, gram = layer(K, N)
    gram, outputs = damped(gram, 0.05), moments()
    dead = np.arange(0, N, 5)
    outputs[dead] = outputs[:, dead] = 0
    _, found, _ = solved(weights, gram, two_sided.damped_outputs(outputs), spec)
    alone = gptq_quantized(weights, gram, spec, damping=0.0)
    column = np.zeros((N, N))
    column[dead, dead] = 1
    assert np.isfinite(found.dequantize()).all()
    assert energy(found, weights, gram, column) < 1.5 * energy(alone, weights, gram, column)


def test_few_outputs_and_one() -> None:
    weights, gram = layer(K, 3)
    for n in (1, 3):
        outputs = two_sided.damped_outputs(moments(n))
        _, found, errors = solved(weights[:, :n], damped(gram, 0.05), outputs, WeightSpec(3, 32))
        assert found.codes.shape == (K, n)
        assert errors[-1] <= errors[0]
