"""Nearest codes are taken where they lose less at the outputs, on made-up inputs or on calibration data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.models.zoo.trap import model
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.measure.noise import noises
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import solve_or_round

K = 96
TEXT = """g (float[n, 16] x) => (float[n, 1] y) {
    small = MatMul(x, a)
    sum = Add(small, b)
    z = Tanh(sum)
    y = MatMul(z, w)
}"""
LABELS = TEXT.replace("float[n, 1] y", "bool[n, 1] label").replace("}", "    label = Greater(y, least)\n}")


def nearly_constant(seed: int, text: str = TEXT) -> ir.Model:
    """One output, which the bias of the hidden layer decides: all its error is one sum of rounding errors, with weights of both signs."""
    rng = np.random.default_rng(seed)
    a, b, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, K), K, (K, 1)))
    least = {"least": np.array(-1e3, np.float32)} if text == LABELS else {}
    return ir.from_proto(model(text, a=1e-3 * a, b=b, w=w, **least))


def noise(exact: ir.Model, made: ir.Model) -> float:
    """Squared error of the output on inputs that no run makes up."""
    x = {"x": np.random.default_rng(1000).standard_normal((256, 16)).astype(np.float32)}
    with Session(exact) as reference, Session(made) as quantized:
        return float(np.square(reference.run(x)[0] - quantized.run(x)[0]).mean())


def test_no_solution_is_worse_than_nearest_codes() -> None:
    better = 0
    for seed in range(8):
        source = nearly_constant(seed)
        (nearest, _), (made, report) = (magr_onnx.optimize(source, bits=4, **options) for options in ({"quantizer": "rtn"}, {}))
        ratio = noise(source, made) / noise(source, nearest)
        assert ratio < 1.07, seed
        rounded = any("rounded to nearest: on made-up inputs" in note for note in report.notes)
        assert ("method=rtn" in report.pipeline) == rounded
        if rounded:
            expected = read_weights(nearest)
            assert {name: weight.tolist() for name, weight in read_weights(made).items()} == {n: w.tolist() for n, w in expected.items()}
        better += ratio < 0.9
    assert better > 0


def test_a_quantizer_that_is_named_is_the_one_that_solves() -> None:
    reports = [magr_onnx.optimize(nearly_constant(seed), bits=4, quantizer="comq").report for seed in range(4)]
    assert all("method=comq" in report.pipeline for report in reports)


def test_layers_are_reported_once() -> None:
    names = list[str]()
    for seed in range(4):
        report = magr_onnx.optimize(nearly_constant(seed), bits=4, on_layer=lambda row: names.append(row.name)).report
        assert names == [row.name for row in report.layers]
        names.clear()


def test_models_of_labels_are_compared_by_the_floats_before_them() -> None:
    """They are solved as the model that puts out those floats, though no label ever changes."""
    chosen = set()
    for seed in range(8):
        labels = magr_onnx.optimize(nearly_constant(seed, LABELS), bits=4).report
        assert labels.pipeline == magr_onnx.optimize(nearly_constant(seed), bits=4).report.pipeline, seed
        chosen.add("method=rtn" in labels.pipeline)
    assert len(chosen) == 2


MLP = """g (float[n, 16] x) => (float[n, 1] y) {
    a = MatMul(x, u)
    b = Relu(a)
    c = MatMul(b, v)
    d = Relu(c)
    y = MatMul(d, w)
}"""


def test_no_kind_of_inputs_loses_to_nearest_codes() -> None:
    """A number for each input: the few of a default comparison say nothing, and inputs of one sign are lost differently than others."""
    better = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        u, v, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 64), (64, 64), (64, 1)))
        source = ir.from_proto(model(MLP, u=u, v=v, w=w))
        (nearest, _), (made, _) = (magr_onnx.optimize(source, bits=4, **options) for options in ({"quantizer": "rtn"}, {}))
        for x in (rng.standard_normal((1024, 16)), rng.random((1024, 16))):
            feeds = {"x": x.astype(np.float32)}
            with Session(source) as a, Session(nearest) as b, Session(made) as c:
                expected, rounded, solved = (session.run(feeds)[0] for session in (a, b, c))
            ratio = np.square(solved - expected).sum() / np.square(rounded - expected).sum()
            assert ratio < 10**0.1, seed
            better += ratio < 0.8
    assert better > 5


CONVOLUTIONS = """g (float[n, 1, 20, 20] x) => (float[n, 1, 20, 20] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, u, c)
    b = Relu(a)
    d = Conv <pads = [1, 1, 1, 1]> (b, v, e)
    h = Relu(d)
    z = Conv <pads = [1, 1, 1, 1]> (h, w, f)
    y = Sigmoid(z)
}"""


def detector(seed: int) -> ir.Model:
    """Three convolutions, whose output is near 0 nearly everywhere: what counts are its few peaks."""
    rng = np.random.default_rng(seed)
    u, v, w, c, e = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 1, 3, 3), (8, 8, 3, 3), (1, 8, 3, 3), 8, 8))
    return ir.from_proto(model(CONVOLUTIONS, u=u, v=v / 4, w=w / 2, c=c, e=e, f=np.array([-6], np.float32)))


def images(seed: int, count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 1, 20, 20)).astype(np.float32)}


def test_data_do_not_make_a_model_worse_than_nearest_codes() -> None:
    """Layers of convolutional networks have less error each, and the output more, now and then."""
    chosen = 0
    for seed in range(4):
        source, data = detector(seed), images(100 + seed, 8)
        nearest, _ = magr_onnx.optimize(source, conv_bits=3, quantizer="rtn", include="*")
        made, report = magr_onnx.optimize(source, data, conv_bits=3, include="*")
        rounded = any("rounded to nearest: on calibration data" in note for note in report.notes)
        with Session(source) as a, Session(nearest) as b, Session(made) as c:
            expected, *others = (session.run(data)[0] for session in (a, b, c))
        of_nearest, of_made = (float(np.square(y - expected).sum()) for y in others)
        assert of_made <= of_nearest, seed
        if rounded:
            codes = read_weights(nearest)
            assert {name: weight.tolist() for name, weight in read_weights(made).items()} == {n: w.tolist() for n, w in codes.items()}
            assert report.calibration.startswith("8 ") or "8 samples" in report.calibration
        chosen += rounded
    assert 0 < chosen < 4


@pytest.mark.parametrize("options", [{"format": "qdq-int8"}, {"format": "qdq-full", "backend": "coreml"}], ids=["qdq-int8", "qdq-full"])
def test_nearest_codes_are_in_the_same_graph(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is of codes alone: the same values are rounded, to the same grids, and the same nodes stay float."""
    made: list[ir.Model] = []
    solve = solve_or_round.solve

    def kept(*arguments: Any) -> solve_or_round.Solved:
        solved = solve(*arguments)
        made.append(solved.model)
        return solved

    def grids(found: ir.Model) -> dict[str, list[float]]:
        nodes = [node for node in found.graph if node.op_type == "QuantizeLinear"]
        return {str(n.inputs[0].name): [v.const_value.numpy().tolist() for v in n.inputs[1:]] for n in nodes}  # type: ignore[union-attr]

    monkeypatch.setattr(solve_or_round, "solve", kept)
    magr_onnx.optimize(detector(0), images(100, 8), **options)
    first, second = made
    assert [node.op_type for node in first.graph] == [node.op_type for node in second.graph]
    assert grids(first) == grids(second)
    assert len(grids(first)) > 0


def test_few_samples_do_not_make_what_a_logarithm_reads_worse_than_nearest_codes() -> None:
    """Energies in overlapping bands: a bias that is right for loud samples makes those of silent ones negative."""
    rng, bands = np.random.default_rng(3), 24
    centres = np.linspace(0, 63, bands)
    filters = np.maximum(1 - np.abs(np.arange(64)[:, None] - centres) / 4, 0).astype(np.float32) * rng.uniform(0.4, 1, bands)
    text = "g (float[n, 64] x) => (float[n, 24] y) { e = MatMul(x, w) f = Max(e, least) y = Log(f) }"
    source = ir.from_proto(model(text, w=filters.astype(np.float32), least=np.array(1e-9, np.float32)))

    def power(count: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
        draw = np.random.default_rng(seed)
        loud = 10.0 ** -draw.uniform(0, 5, (count, 1))
        return {"x": (loud * draw.standard_normal((count, 64)) ** 2).astype(np.float32)}

    fresh = power(512, 1)
    data, options = power(16, 0), {"bits": 4, "block_size": 16}
    results = [magr_onnx.optimize(source, data, **options).model, magr_onnx.optimize(source, quantizer="rtn", **options).model]  # type: ignore[arg-type]
    with Session(source) as reference:
        exact = reference.run(fresh)[0]
    errors = []
    for made in results:
        with Session(made) as session:
            errors.append(float(np.square(session.run(fresh)[0] - exact).sum()))
    assert errors[0] < 1.07 * errors[1]


def test_neither_with_a_quantizer_that_is_named_nor_under_a_budget() -> None:
    source, data = detector(1), images(101, 8)
    for options in ({"quantizer": "gptq", "conv_bits": 3}, {"max_loss": "50%"}):
        report = magr_onnx.optimize(source, data, include="*", **options).report
        assert not any("rounded to nearest" in note for note in report.notes)


def test_noise_is_the_mean_over_outputs_relative_to_their_energy() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Mul(x, a) z = Mul(x, b) }"
    one, other = (ir.from_proto(model(text, a=np.array(a, np.float32), b=np.array(b, np.float32))) for a, b in ((1, 2), (1.1, 2.1)))
    data = in_memory([{"x": np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32)} for i in range(2)], "random")
    np.testing.assert_allclose(noises(one, [one, other], data, "cpu", None), [0, (0.1**2 + 0.05**2) / 2], rtol=1e-4, atol=1e-12)
