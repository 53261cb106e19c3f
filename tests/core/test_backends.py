"""Solvers in torch against the same solvers in NumPy, and what is said where there is no torch, no GPU, or no form for it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import backends, error_feedback, linalg, magr, prox
from magr_onnx.core.backends import HOST
from magr_onnx.core.gram import RowGram
from magr_onnx.core.grid import minmax, search
from magr_onnx.core.moments import MomentAccumulator, split_stats, with_folds
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, cross_validation, gptq
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.errors import DependencyError, MagrError, OptionError
from tests.helpers import Array, activations, layer

K, N = 160, 48


def stats_of(rows: int = 600, k: int = K) -> LayerStats:
    def moments(x: Array) -> LayerStats:
        return LayerStats(x.T.astype(np.float64) @ x / len(x), x.mean(axis=0, dtype=np.float64), len(x))

    x = activations(rows, k)
    return replace(moments(x), folds=(moments(x[::4]),))


def on(backend: Any, stats: LayerStats) -> LayerStats:
    """The same statistics, with nothing computed from them yet."""
    return LayerStats(stats.gram, stats.mean, stats.rows, folds=stats.folds, backend=backend)


@pytest.mark.parametrize(
    "spec", [WeightSpec(3, 32), WeightSpec(4, None, symmetric=True), WeightSpec(4, 50, scale_dtype="float16")], ids=str
)
@pytest.mark.parametrize("name", [name for name, quantizer in QUANTIZERS.items() if quantizer.on_device])
def test_quantizers_find_what_they_find_in_numpy(name: str, spec: WeightSpec, device: Any) -> None:
    weights, stats = layer(K, N)[0], stats_of()
    before = weights.copy(), stats.gram.copy()
    here, there = (QUANTIZERS[name].run(Problem(weights, weights, on(b, stats), True, spec), Options()) for b in (HOST, device))
    errors = [linalg.layer_error(s.weight.dequantize().astype(np.float64) - weights, stats.objective_gram(True)) for s in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert np.mean(here.weight.codes == there.weight.codes) > 0.99
    assert there.weight.codes.dtype == np.uint8
    assert all(isinstance(array, np.ndarray) for array in (there.weight.codes, there.weight.scales, there.weight.zero_points))
    assert there.figures.keys() == here.figures.keys()
    np.testing.assert_array_equal(weights, before[0])  # torch on the CPU shares arrays with NumPy
    np.testing.assert_array_equal(stats.gram, before[1])


@pytest.mark.parametrize("k", [K, K + 7])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("method", ["fista", "authors"])
def test_magr_reaches_what_it_reaches_in_numpy(method: Any, group: int | None, k: int, device: Any) -> None:
    weights, gram = layer(k, N)
    options: dict[str, Any] = {"alpha": 1e-3, "relative": method == "fista", "group_size": group, "method": method}
    here = magr.reduce(weights, gram, **options)
    there = magr.reduce(device.array(weights), device.array(gram), **options).host()
    assert there.objective == pytest.approx(here.objective, rel=1e-5)
    assert there.trace == pytest.approx(here.trace, rel=1e-3)
    assert there.weights.dtype == np.float32
    np.testing.assert_allclose(there.weights, here.weights, atol=1e-2 * np.abs(here.weights).max())


def test_what_is_computed_exactly_is_the_same(device: Any) -> None:
    """Ranges and their grids; codes of weights that are halves and quarters, from inputs that have nothing in common."""
    weights = np.random.default_rng(0).integers(-40, 41, (K, N)).astype(np.float32) / 4
    for spec in (WeightSpec(4, 32), WeightSpec(2, None, symmetric=True), WeightSpec(8, 50, scale_dtype="float16")):
        grids = minmax(weights, spec), minmax(device.array(weights), spec)
        np.testing.assert_array_equal(device.host(grids[1].scales), grids[0].scales)
        np.testing.assert_array_equal(device.host(grids[1].zeros), grids[0].zeros)
        feedback = gptq.prepare(device.array(np.eye(K)), 0.0)
        codes = gptq.solve(device.array(weights), feedback, grids[1]).host().codes
        np.testing.assert_array_equal(codes, grids[0].codes(weights))


def test_searched_grids_are_as_good(device: Any) -> None:
    """In every group: which of two grids is the better one is a matter of rounding where both are equally good."""
    weights, gram = layer(K, N)
    losses = []
    for w in (weights, device.array(weights)):
        grid = search(w, WeightSpec(3, 32), gram.diagonal())
        rounded = grid.weight(grid.codes(w)).host().dequantize().astype(np.float64)
        losses.append((gram.diagonal()[:, None] * (rounded - weights) ** 2).reshape(-1, 32, N).sum(axis=1))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 33), (5, 4, 16)])
def test_levels_solve_their_equation(shape: tuple[int, ...], device: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32)
    metric = rng.uniform(0.5, 2, shape[1:]).astype(np.float32)
    for start in (None, np.full(shape[:-1], 9.0, np.float32), np.zeros(shape[:-1], np.float32)):  # right of the root, and left of it
        begin = None if start is None else device.array(start)
        level = device.host(prox.levels(device.array(values), 0.7, device.array(metric), begin))
        mass = (metric * np.maximum(np.abs(values) - level[..., None], 0)).sum(axis=-1)
        np.testing.assert_allclose(mass, 0.7, rtol=1e-4)


def test_factors_and_solutions_are_those_of_numpy(device: Any) -> None:
    gram, x = layer(K, N)[1], np.random.default_rng(0).standard_normal((K, 5))
    lower = linalg.cholesky(device.array(gram), 0.1).lower
    np.testing.assert_allclose(device.host(lower @ lower.T), linalg.damped(gram, 0.1), rtol=1e-9, atol=1e-12)
    solved = device.host(linalg.solver(linalg.damped(device.array(gram), 0.1))(device.array(x)))
    np.testing.assert_allclose(linalg.damped(gram, 0.1) @ solved, x, atol=1e-2)  # in single precision
    assert linalg.lambda_max(device.array(gram)) == pytest.approx(linalg.lambda_max(gram), rel=1e-6)


def test_a_matrix_that_is_not_definite_is_damped_as_in_numpy(device: Any) -> None:
    gram = np.ones((K, K))
    here, there = (gptq.prepare(matrix, 0.0) for matrix in (gram, device.array(gram)))
    assert there.notes(0.0) == here.notes(0.0)
    assert there.notes(0.0)


def test_matrices_of_few_rows_have_all_entries_there(device: Any) -> None:
    gram = RowGram.of(activations(20, K)).plus_diagonal(0.5)
    np.testing.assert_allclose(device.host(backends.gram_on(gram, device)), gram.dense(), rtol=1e-5, atol=1e-4)
    assert backends.gram_on(gram, HOST) is gram


@pytest.mark.parametrize("centred", [True, False])
def test_sums_and_targets_of_error_feedback_are_those_of_numpy(centred: bool, device: Any) -> None:
    """From rows of a float layer and of one behind a quantized layer; a fourth of the rows, and a batch of them, is held out."""
    weights, x = layer(K, N)[0], activations(800, K).astype(np.float32)
    rounded = (x + 0.3 * np.random.default_rng(1).standard_normal(x.shape)).astype(np.float32) @ np.eye(K, dtype=np.float32)
    found = []
    for backend in (HOST, device):
        parts = [MomentAccumulator(K, float_mean=True, paired=True, backend=backend) for _ in range(2)]
        for at in range(0, 800, 200):
            rows = slice(at, at + 200)
            parts[min(at, 1)].add_rows(rounded[rows], x[rows], 1.0 if at else 0.5)
        moments = with_folds([part.target_moments(weights) for part in parts], 1)
        stats = split_stats(parts, 1, None)
        assert stats is not None
        assert stats.backend is stats.without(0).backend is backend
        target = error_feedback.solve_target(weights, stats, moments, centred)
        found.append((stats.gram, moments.cross, moments.power, target.weights, target.before, target.after))
        assert target.damping is not None
        assert all(isinstance(array, np.ndarray) for array in (stats.gram, moments.cross, target.weights, *target.fits))
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-5 * np.abs(here).max())


@pytest.mark.parametrize("name", ["hqq", "gptq"])
def test_what_has_no_form_for_a_device_is_solved_on_the_cpu_and_says_so(name: str, device: Any) -> None:
    spec = WeightSpec(4, None, symmetric=True)
    weights, stats = layer(K, N)[0], stats_of()
    budget = Budget(Accumulator(16), -128, 127) if name == "gptq" else None
    declared = {option.name: option.default for option in QUANTIZERS[name].options}
    here, there = (
        cross_validation.run(
            QUANTIZERS[name], Problem(weights, weights, on(b, stats), True, spec, budget), Options(method_options=declared)
        )
        for b in (HOST, device)
    )
    np.testing.assert_array_equal(there.weight.codes, here.weight.codes)
    assert [note for note in there.notes if note not in here.notes] == [
        f"solved on the CPU, not on {device.name}: "
        + ("quantizer hqq has no form for a device" if name == "hqq" else "sums within an accumulator have no form for a device")
    ]


def test_products_are_exact_while_a_run_lasts(device: Any) -> None:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with device.exact():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_without_memory_is_named(device: Any) -> None:
    import torch

    with pytest.raises(MagrError, match=f"device {device.name} .* is out of memory; .*leave the device out"), device.exact():
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "torch", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="is not known; choose one of cpu, cuda, cuda:N"):
        backends.find(name)


def test_a_missing_gpu_is_named() -> None:
    pytest.importorskip("array_api_compat")
    import torch

    count = torch.cuda.device_count()
    with pytest.raises(OptionError, match=f"cuda:{count}: torch .*finds" if not count else f"cuda:{count}: torch finds {count} GPU"):
        backends.find(f"cuda:{count}")


@pytest.mark.parametrize("package", ["torch", "array_api_compat"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=r"device cuda needs .*onnx-magr\[gpu\]"):
        backends.find("cuda")
    assert backends.find("cpu") is HOST
