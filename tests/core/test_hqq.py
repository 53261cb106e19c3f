"""Half-quadratic quantization: its own objective, its parts against naive oracles, the emitted model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import magr_onnx
from magr_onnx.core.grid import minmax, stored
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, hqq, rtn
from magr_onnx.core.types import LayerStats, QuantizedWeight, WeightSpec
from magr_onnx.models import bundled
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.runtime.ort.session import Session
from tests.helpers import SPECS, Array

some_specs = pytest.mark.parametrize("spec", [*SPECS, WeightSpec(8, 7)], ids=str)


def heavy(k: int = 90, n: int = 12, seed: int = 0) -> Array:
    weights: Array = (np.random.default_rng(seed).standard_t(2.5, (k, n)) * 0.05).astype(np.float32)
    return weights


def lp(weights: Array, found: QuantizedWeight) -> Array:
    """``sum |w - w_hat|^0.7`` by group, with a loop."""
    error = np.abs(weights.astype(np.float64) - found.dequantize()) ** hqq.P
    rows = found.spec.group_of_row(len(weights))
    return np.stack([error[rows == g].sum(axis=0) for g in range(found.spec.groups(len(weights)))])


@some_specs
@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_ends_above_either_start_and_all_together_well_below(spec: WeightSpec, seed: int) -> None:
    weights = heavy(seed=seed)
    found = hqq.quantize(weights, spec)
    searched, plain = (rtn.quantize(weights, np.ones(len(weights)), spec, beta=beta) for beta in (None, 1.0))
    for start in (searched, plain):
        assert (lp(weights, found) <= lp(weights, start) * (1 + 1e-5)).all()
    assert lp(weights, found).sum() < 0.995 * lp(weights, searched).sum()
    np.testing.assert_allclose(hqq.objective(weights, found.dequantize(), spec), lp(weights, found), rtol=1e-4)


def test_outliers_are_clipped_for_the_sake_of_the_many() -> None:
    weights = np.random.default_rng(0).uniform(-1, 1, (64, 8)).astype(np.float32)
    weights[5] = 12
    spec = WeightSpec(3, 64)
    found, plain = hqq.quantize(weights, spec), rtn.quantize(weights, np.ones(64), spec)
    rest = np.arange(64) != 5
    errors = [float(np.median(np.abs(w.dequantize() - weights)[rest])) for w in (found, plain)]
    assert errors[0] < 0.6 * errors[1]


@some_specs
def test_the_grid_is_one_the_file_can_hold(spec: WeightSpec) -> None:
    weights = heavy()
    found = hqq.quantize(weights, spec)
    np.testing.assert_array_equal(found.scales, found.scales.astype(spec.scale_dtype).astype(np.float32))
    np.testing.assert_array_equal(found.scales, stored(found.scales, spec))
    assert (found.scales > 0).all()
    assert max(found.codes.max(), found.zero_points.max()) <= spec.top
    if spec.symmetric:
        assert (found.zero_points == spec.middle).all()
    zeros = hqq.quantize(np.zeros((40, 3), np.float32), spec)
    assert not zeros.dequantize().any()


def test_shrinkage_solves_its_half() -> None:
    """The authors' closed form is about one step of the fixed-point iteration for the minimiser: close to it, and zero where that is."""
    beta = hqq.BETA
    for x in (0.02, 0.5, 2.0, 8.0):
        cost = lambda e, x=x: abs(e) ** hqq.P + beta / 2 * (e - x) ** 2  # noqa: E731
        best = minimize_scalar(cost, bounds=(0, x), method="bounded").x
        best = best if cost(best) < cost(0.0) else 0.0
        found = float(hqq._shrink(np.array([x]), beta)[0])
        assert found == pytest.approx(best, abs=0.05)
        assert float(hqq._shrink(np.array([-x]), beta)[0]) == -found
    assert hqq._shrink(np.zeros(3), beta).tolist() == [0, 0, 0]


def test_columns_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, spec = heavy(), WeightSpec(3, 32)
    whole = hqq.quantize(weights, spec)
    monkeypatch.setattr(hqq, "_COLUMN_VALUES", 1)
    one_by_one = hqq.quantize(weights, spec)
    np.testing.assert_array_equal(whole.codes, one_by_one.codes)
    np.testing.assert_allclose(whole.scales, one_by_one.scales, rtol=1e-5)  # sums in another order


def test_the_units_of_the_weights_do_not_matter() -> None:
    weights, spec = heavy(), WeightSpec(3, 32)
    found, larger = hqq.quantize(weights, spec), hqq.quantize(weights * 1024, spec)
    np.testing.assert_array_equal(found.codes, larger.codes)
    np.testing.assert_array_equal(found.scales * 1024, larger.scales)


def test_data_is_not_looked_at() -> None:
    weights, spec = heavy(), WeightSpec(4, 32)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, len(weights)))
    found = [
        QUANTIZERS["hqq"].run(Problem(weights, weights, stats, False, spec), Options())
        for stats in (LayerStats.data_free(len(weights)), LayerStats(x.T @ x / 200, x.mean(axis=0), 200))
    ]
    np.testing.assert_array_equal(found[0].weight.codes, found[1].weight.codes)
    assert found[0].figures["lp_error"] == pytest.approx(lp(weights, found[0].weight).sum(), rel=1e-4)
    assert not np.array_equal(found[0].weight.scales, minmax(weights, spec).scales)


@pytest.mark.parametrize("calibration", [None, bundled.CALIBRATION])
def test_bundled_model(calibration: object) -> None:
    model, report = magr_onnx.optimize(bundled.MODEL, calibration, quantizer="hqq", bits=3, alpha=0.0)
    assert report.verified == len(report.layers) == len(read_weights(model)) == 21
    assert all(r.solver and r.solver["lp_error"] > 0 for r in report.layers)
    with Session(model) as session:
        (logits,) = session.run({"input_ids": np.load(bundled.HELD_OUT)["input_ids"][:4]})
    assert np.isfinite(logits).all()


def test_it_knows_no_accumulators() -> None:
    with pytest.raises(magr_onnx.OptionError, match="hqq knows no accumulators"):
        magr_onnx.optimize("no such file", quantizer="hqq", format="qdq-int8", target="generic")
