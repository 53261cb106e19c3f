"""Low-rank error reconstruction: the closed form against oracles, and the branch in emitted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import low_rank
from magr_onnx.core.linalg import damped, layer_error
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.models import bundled
from magr_onnx.passes import Plan, SolvedLayer, find, run_layers
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests import graphs
from tests.graphs import FORMS, correlated, feeds, proto
from tests.helpers import Array, few_samples, layer
from tests.passes.test_emit import fused

K, N = 48, 20


def lost(bits: int = 3) -> tuple[Array, Array]:
    """What rounding loses, ``(K, N)`` float64, and the Gram matrix."""
    weights, gram = layer(K, N)
    return weights.astype(np.float64) - rtn.quantize(weights, gram.diagonal(), WeightSpec(bits, 16)).dequantize(), gram


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_it_is_the_paper_s_closed_form_with_the_symmetric_root(rank: int, damping: float) -> None:
    difference, gram = lost()
    values, vectors = np.linalg.eigh(damped(gram, damping))
    symmetric = vectors * np.sqrt(values) @ vectors.T
    u, sigma, v = np.linalg.svd(symmetric @ difference)
    expected = np.linalg.solve(symmetric, u[:, :rank] * sigma[:rank]) @ v[:rank]
    found = low_rank.reconstruct(difference, low_rank.root(gram, damping, "exact"), rank)
    assert found.down.shape == (K, rank)
    assert found.up.shape == (rank, N)
    np.testing.assert_allclose(found.product(), expected, atol=1e-5 * np.abs(expected).max())


def test_exact_beats_diagonal_beats_the_plain_decomposition() -> None:
    difference, gram = lost()
    plain = low_rank.Root(np.ones(K))
    exact, diagonal, unweighted = (
        layer_error(difference - low_rank.reconstruct(difference, r, 4).product(), gram)
        for r in (low_rank.root(gram, 1e-6, "exact"), low_rank.root(gram, 1e-6, "diagonal"), plain)
    )
    assert exact < 0.6 * diagonal
    assert diagonal < unweighted < layer_error(difference, gram)


def test_no_other_factors_of_that_rank_are_better() -> None:
    difference, gram = lost()
    found = low_rank.reconstruct(difference, low_rank.root(gram, 0.0, "exact"), 3)
    best = layer_error(difference - found.product().astype(np.float64), gram)
    rng = np.random.default_rng(0)
    for _ in range(50):
        down, up = (a + 1e-2 * np.abs(a).mean() * rng.standard_normal(a.shape) for a in (found.down, found.up))
        assert layer_error(difference - down @ up, gram) > best


@pytest.mark.parametrize("kind", ["exact", "diagonal"])
def test_full_rank_gives_everything_back_and_dead_inputs_do_no_harm(kind: low_rank.Kind) -> None:
    difference, gram = lost()
    gram[3] = gram[:, 3] = 0
    found = low_rank.reconstruct(difference, low_rank.root(gram, 0.01, kind), N)
    np.testing.assert_allclose(found.product(), difference, atol=1e-5)
    none = low_rank.reconstruct(np.zeros((K, N)), low_rank.root(np.zeros((K, K)), 0.01, kind), 2)
    assert not none.product().any()


def stats_of(k: int, rows: int = 400) -> LayerStats:
    x = correlated(rows, k).astype(np.float64)
    return LayerStats(x.T @ x / rows, x.mean(axis=0), rows)


def emit(model: ir.Model, text: str) -> tuple[ir.Model, list[SolvedLayer]]:
    plan, results = Plan.parse(text), list[SolvedLayer]()
    plan.check()
    plan.prepare(model)
    run_layers(plan, find(model)[0], lambda layer: stats_of(layer.k), results.append)
    proto(model)
    return model, results


def relative(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("emitter", ["emit-matmulnbits", "emit-qdq"])
@pytest.mark.parametrize("bias", ["none", "any"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_with_codes_and_factors(form: str, bias: str, emitter: str) -> None:
    after = f"compensate-bias{{bias={bias}}},{emitter}"
    model, (done,) = emit(FORMS[form](), f"quantize{{method=rtn,bits=3}},low-rank{{rank=5}},{after}")
    assert done.solution.quantized is not None
    assert done.solution.factors is not None
    np.testing.assert_array_equal(done.solution.weight, done.solution.quantized.dequantize() + done.solution.factors.product())
    assert list(read_weights(model)) == ["y"]
    np.testing.assert_array_equal(read_weights(model)["y"], done.solution.quantized.dequantize())
    assert "w" not in model.graph.initializers
    x = feeds(model)["x"]
    expected = x.astype(np.float64) @ done.solution.weight + (0 if done.solution.bias is None else done.solution.bias)
    for arithmetic, bound in ((Arithmetic.UNOPTIMIZED, 1e-5), (Arithmetic.FLOAT_QDQ, 1e-5), (Arithmetic.DEFAULT, 2e-2)):
        with Session(model, arithmetic=arithmetic) as session:
            assert relative(session.run({"x": x})[0], expected) < bound


@pytest.mark.parametrize("form", ["matmul", "matmul_bias", "gemm", "gemm_no_bias"])
def test_the_branch_does_not_keep_weights_from_their_kernel(form: str, tmp_path: Path) -> None:
    model, _ = emit(FORMS[form](), "quantize,low-rank,emit-qdq")
    for value in (*model.graph.inputs, *model.graph.outputs):  # two axes tempt onnxruntime to make a Gemm
        assert value.shape is not None
        value.shape = ir.Shape(["rows", value.shape[-1]])
    operators = fused(model, tmp_path)
    assert "MatMulNBits" in operators
    assert not {"DequantizeLinear", "Gemm"} & set(operators)


def test_layers_of_one_input_and_bias_compensation_see_the_branch() -> None:
    model, results = emit(graphs.chain(), "quantize{method=rtn,bits=2},low-rank{rank=4},compensate-bias,emit-matmulnbits")
    assert [j.layer.name for j in results] == ["up", "down"]
    assert set(read_weights(model)) == {"up_out", "down_bias_out"}
    for done in results:
        stats = done.problem.stats
        assert done.solution.bias is not None
        before = done.layer.read_bias()
        assert before is not None
        error = done.problem.weight.astype(np.float64) - done.solution.weight
        np.testing.assert_allclose(done.solution.bias - before, error.T @ stats.mean, atol=1e-6)
        facts = done.solution.record.low_rank
        assert facts["error_after"] == pytest.approx(done.solution.record.error)
        assert facts["error_after"] < 0.9 * facts["error_before"]


@pytest.mark.parametrize("emitter", ["emit-matmulnbits", "emit-qdq"])
def test_half_precision_keeps_half_precision_factors(emitter: str) -> None:
    model, (done,) = emit(graphs.matmul_bias(64, 24, dtype=np.float16), f"quantize{{method=rtn,bits=3}},low-rank{{rank=4}},{emitter}")
    branch = [v for name, v in model.graph.initializers.items() if name.endswith(("_down", "_up"))]
    assert [v.dtype for v in branch] == [ir.DataType.FLOAT16] * 2
    x = feeds(model)["x"]
    expected = x.astype(np.float64) @ done.solution.weight + done.solution.bias
    with Session(model, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        (y,) = session.run({"x": x})
    assert y.dtype == np.float16
    assert relative(y.astype(np.float64), expected) < 3e-3


def test_alone_it_leaves_a_float_model() -> None:
    model, results = emit(graphs.chain(), "quantize{method=rtn,bits=2},low-rank{kind=diagonal}")
    for done, found in zip(results, find(model)[0], strict=True):
        np.testing.assert_array_equal(found.read(), done.solution.weight)


@pytest.mark.parametrize("form", ["matmulnbits", pytest.param("qdq", marks=pytest.mark.slow)])
def test_bundled_model(form: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    bits = 2 if form == "matmulnbits" else 3
    errors = {}
    for rank in (0, 8):
        options: dict[str, Any] = {"bits": bits, "format": form, "low_rank": rank, "quantizer": "gptq"}
        _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=out, **options)
        assert report.verified == len(report.layers) == 21
        checked = magr_onnx.validate(bundled.MODEL, out, few_samples(bundled.HELD_OUT), arithmetics=(Arithmetic.FLOAT_QDQ,), latency=False)
        assert len(checked.layers) == 21
        errors[rank] = checked.arithmetics[Arithmetic.FLOAT_QDQ][0].kl
        assert all((r.low_rank is not None) == (rank > 0) for r in report.layers)
    assert errors[0] is not None
    assert errors[8] is not None
    assert errors[8] < 0.95 * errors[0]
    assert "low-rank" in ir.load(out).metadata_props["onnx_magr.pipeline"]


def test_with_error_feedback_and_without_data() -> None:
    batch = [feeds(graphs.chain(), rows=64, seed=s) for s in range(4)]
    for calibration, options in ((batch, {"feedback": True}), (None, {})):
        model, report = magr_onnx.optimize(graphs.chain(), calibration, bits=2, low_rank=2, **options)  # type: ignore[arg-type]
        assert report.verified == 2
        for row in report.layers:
            assert row.low_rank is not None
            assert row.low_rank["error_after"] < row.low_rank["error_before"]
        with Session(model) as session:
            assert np.isfinite(session.run(batch[0])[0]).all()


def test_a_rank_beyond_the_layer_is_said() -> None:
    _, report = magr_onnx.optimize(graphs.matmul(), low_rank=1000, alpha=0.0, include=["*"])
    assert report.layers[0].notes == ("low-rank: a 40 x 24 layer has rank 24 at most, not 1000",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low-rank,emit-matmulnbits", "low-rank needs a quantize pass before it"),
        ("quantize,low-rank{rank=0}", "rank=0 must be at least 1"),
        ("quantize,compensate-bias,low-rank,emit-matmulnbits", "low-rank must come before compensate-bias"),
        ("quantize,emit-matmulnbits,low-rank", "low-rank must come before emit-matmulnbits"),
        ("quantize,low-rank{kind=best}", "choose one of exact, diagonal"),
        ("quantize-activations,quantize{block_size=none},low-rank,emit-qdq-int8", "layers with 8-bit inputs do without"),
    ],
)
def test_bad_pipelines(text: str, message: str) -> None:
    with pytest.raises(magr_onnx.OptionError, match=message):
        Plan.parse(text).check()


@pytest.mark.parametrize("form", ["qdq-int8", "dynamic-int8"])
def test_integer_formats_refuse_it(form: Any) -> None:
    with pytest.raises(magr_onnx.OptionError, match="use format matmulnbits or qdq"):
        magr_onnx.build_pipeline(format=form, low_rank=4)
    with pytest.raises(magr_onnx.OptionError, match="rank=-1 must be at least 1"):
        magr_onnx.build_pipeline(low_rank=-1)
