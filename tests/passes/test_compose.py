"""Every pass of this package in `ir.passes.Sequential` with the passes of onnx-ir and onnxscript, before, in between and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import pytest
from onnx_ir.passes import common

from magr_onnx import passes as ours
from magr_onnx.passes import Plan, find
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.layers import conv, embedding
from magr_onnx.passes.registry import passes, stages
from magr_onnx.runtime.calibration.moments import attach_stats
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.graphs import Array, Builder, random
from tests.pairwise import each_value

INT8 = "quantize{bits=8,block_size=none,symmetric=true}"
# The passes that every pass needs around it to do something.
PIPELINES = {name: name for name in passes()} | {
    "split-outliers": "split-outliers,quantize{bits=3}",
    "low-rank": "quantize{bits=2},low-rank{rank=4},emit-matmulnbits",
    "compensate-bias": "magr,quantize{bits=3},compensate-bias,emit-qdq",
    "emit-matmulnbits": "quantize,emit-matmulnbits",
    "emit-qdq": "quantize,emit-qdq",
    "emit-dynamic-int8": f"quantize-activations{{type=dynamic}},{INT8},emit-dynamic-int8",
    "emit-qdq-int8": "equalize",  # needs grids of activations, which a whole run measures; see below
    "emit-qdq-full": "equalize",  # likewise
}
STOCK: dict[str, Callable[[], ir.passes.PassBase]] = {
    name: getattr(common, name) for name in common.__all__ if name != "AddInitializersToInputsPass"
}


def model() -> ir.Model:
    """A table, a convolution, a norm before a layer, a GELU before another, an outlier, constants in nodes, a node that is done twice."""
    b = Builder(21)
    ids, image = b.input("ids", ["batch"], ir.DataType.INT64), b.input("image", ["batch", 3, 4, 4])
    table = b.node("Gather", [b.constant("table", random(64, 48)), ids], "table_rows")
    seen = b.node("Conv", [image, b.constant("kernel", random(3, 3, 3, 3)), b.constant("kernel_bias", random(3))], "conv", pads=[1] * 4)
    flat = b.node("Reshape", [seen, b.constant("shape", np.array([0, 48]))], "flat")
    x = b.node("Add", [table, flat], "sum")
    scale = 1 + np.linspace(0, 6, 48).astype(np.float32)
    normed = b.node("LayerNormalization", [x, b.constant("norm", scale), b.constant("norm_bias", random(48))], "layer_norm")
    up = random(48, 64, seed=3)
    up[7] *= 40
    hidden = b.node("MatMul", [normed, b.constant("w_up", up)], "up")
    hidden = b.node("Add", [hidden, b.constant("b_up", random(64))], "up_bias")
    twice = b.node("Add", [b.node("Tanh", [hidden], "tanh"), b.node("Tanh", [hidden], "tanh_again")], "twice")
    held = b.node("Constant", [], "held", value=ir.tensor(random(64, 32, seed=4)))
    down = b.node("MatMul", [b.node("Identity", [twice], "same"), held], "down")
    return b.model(b.node("Gemm", [down, b.constant("w_out", random(10, 32, seed=5))], "out", transB=1), ["batch", 10])


def feeds(rows: int = 64) -> dict[str, Array]:
    return {"ids": np.arange(rows) % 64, "image": random(rows, 3, 4, 4, seed=9, scale=1.0)}


def ran(sequence: Sequence[ir.passes.PassBase]) -> tuple[ir.Model, Array]:
    """The model after a sequence of passes, and what it computes."""
    work = model()
    attach_stats(work, in_memory([feeds()], "feeds"))
    result = ir.passes.Sequential(*sequence)(work).model if sequence else work
    with Session(result, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        return result, session.run(feeds())[0]


def weights(result: ir.Model) -> list[Array]:
    """All weights, as a reader of the file finds them."""
    floats = [layer.read() for layer in find(result)[0]]
    return [
        *floats,
        *read_weights(result).values(),
        *(t.read() for t in embedding.find(result)[0]),
        *(c.read() for c in conv.find(result)[0]),
    ]


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[ir.Model, Array]]:
    return {name: ran(Plan.parse(text).passes) for name, text in PIPELINES.items()}


def test_the_float_model_is_what_passes_change(plain: dict[str, tuple[ir.Model, Array]]) -> None:
    """Nothing here is tested by doing nothing."""
    _, floats = ran([])
    idle = {name for name, (_, y) in plain.items() if np.array_equal(y, floats)}
    assert idle <= {"twin-ranges", "split-salient", "recurrent", "rotate"}  # for activations, gradients of a run; what is not in it
    assert {n: e for n, (_, y) in plain.items() if (e := np.square(y - floats).sum() / np.square(floats).sum()) > 0.3} == {}


@pytest.mark.parametrize(("name", "stock"), each_value(list(passes()), list(STOCK), times=2))
def test_stock_passes_around_it(name: str, stock: str, plain: dict[str, tuple[ir.Model, Array]]) -> None:
    expected, y = plain[name]
    found, z = ran([STOCK[stock](), *(p for mine in Plan.parse(PIPELINES[name]).passes for p in (mine, STOCK[stock]()))])
    np.testing.assert_allclose(z, y, atol=2e-5 * np.abs(y).max())
    a, b = weights(expected), weights(found)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", passes())
def test_onnxscript_before_and_after(name: str, plain: dict[str, tuple[ir.Model, Array]]) -> None:
    _, y = plain[name]
    work = model()
    onnxscript.optimizer.optimize(work)
    attach_stats(work, in_memory([feeds()], "feeds"))
    ir.passes.Sequential(*Plan.parse(PIPELINES[name]).passes)(work)
    work = onnxscript.rewriter.rewrite(work)
    onnxscript.optimizer.optimize(work)
    with Session(work, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        np.testing.assert_allclose(session.run(feeds())[0], y, atol=2e-5 * np.abs(y).max())


def test_every_pass_is_exported() -> None:
    public = {name for name, value in vars(ours).items() if isinstance(value, type) and issubclass(value, ir.passes.PassBase)}
    assert public <= set(ours.__all__)
    assert public - {kind.__name__ for kind in passes().values()} == {"Emitter", "LayerPass", "ModelPass", "Rewrite"}
    assert {kind.__name__ for kind in passes().values()} <= public
    settings = {kind.__name__ for name, kind in stages().items() if name not in passes()}
    assert settings == {"ErrorFeedback", "OutputHessian", "QuantizeActivations", "TuneScales"}
    assert settings <= set(ours.__all__)
    assert list(ours.__all__) == sorted(ours.__all__, key=lambda n: (n.lower() == n, not n.isupper(), n))


def test_initializers_as_inputs_are_nobodys_weights() -> None:
    """What a caller may replace is left alone, as everywhere, until the inverse pass has run."""
    work = model()
    ir.passes.Sequential(common.AddInitializersToInputsPass(), *Plan.parse("quantize,emit-matmulnbits,embeddings").passes)(work)
    assert read_weights(work).keys() == {"down_out"}  # of a Constant
    ir.passes.Sequential(common.RemoveInitializersFromInputsPass(), *Plan.parse("quantize,emit-matmulnbits,embeddings").passes)(work)
    assert len(read_weights(work)) == 4


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Plan.parse("quantize{bits=2},emit-qdq").passes, "2 bits with format qdq"),
        ([ours.Embeddings("dequantize", 4)], "dequantize has 8 bits"),
        ([ours.Embeddings("foo")], "embeddings='foo' is not known"),  # type: ignore[arg-type]
        ([ours.Convolutions(2)], "convolutions: bits=2 is not supported"),
        ([ours.Convolutions(alpha=np.nan)], "convolutions: alpha=nan must be 0 or more, and finite"),
    ],
)
def test_options_are_checked_in_a_sequence_too(chosen: Sequence[ir.passes.PassBase], message: str) -> None:
    work = model()
    before = [node.op_type for node in work.graph]
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(*chosen)(work)
    assert message in str(caught.value.__cause__)
    if len(chosen) == 1:
        assert [node.op_type for node in work.graph] == before


@pytest.mark.parametrize(("name", "kind"), [("embeddings", "GatherBlockQuantized"), ("convolutions", "Cast")])
def test_alone_a_pass_converts(name: str, kind: str) -> None:
    work = model()
    chosen = stages()[name]()
    assert isinstance(chosen, ir.passes.PassBase)
    assert chosen(work).modified
    assert kind in {n.op_type for n in work.graph}
    assert not chosen(work).modified


@pytest.mark.parametrize(("kind", "taken"), [(ours.Embeddings, "table_q8"), (ours.Convolutions, "kernel_q8")])
def test_passes_see_names_that_other_code_took(kind: type[ir.passes.InPlacePass], taken: str) -> None:
    b = Builder()
    rows = b.node("Gather", [b.constant("table", random(64, 32)), b.input("ids", ["n"], ir.DataType.INT64)], "gather")
    product = b.node("MatMul", [rows, b.constant("w", random(32, 8))], "product")
    convolved = b.node("Conv", [b.input("image", [1, 2, 8, 8]), b.constant("kernel", random(4, 2, 3, 3))], "conv")
    model = b.model_of([product, convolved])
    ours.Quantize("rtn")(model)  # names of the model are known from here on
    model.graph.register_initializer(ir.Value(name=taken, const_value=ir.tensor(np.zeros(1, np.float32), name=taken)))
    kind()(model)
    assert {taken, f"{taken}_1"} <= set(model.graph.initializers)


def test_a_rewrite_by_itself_refuses_wrong_options() -> None:
    b = Builder()
    product = b.node("MatMul", [b.input("x", ["n", 32]), b.constant("w", random(32, 8))], "product")
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(ours.SplitOutliers(factor=0.5))(b.model_of([product]))
    assert "must be above 1" in str(caught.value.__cause__)
