"""Models that already have every name a run would make: in the main graph, as constants and in bodies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.models.zoo import ZOO
from magr_onnx.passes.graph import names
from tests import graphs
from tests.graphs import Array, proto

Feeds = Mapping[str, Array]
FORMATS = ("matmulnbits", "qdq", "qdq-int8", "dynamic-int8")
INT8: dict[str, Any] = {"format": "qdq-int8", "quantize_outputs": True}
OWN = {"masked": graphs.masked, "chain": graphs.chain, "old": lambda: graphs.chain(opset=7), "gemm": graphs.gemm}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "matmulnbits": ("masked", {"effort": "best"}),
    "low-rank": ("chain", {"low_rank": 2, "format": "qdq"}),
    "int8": ("masked", INT8),
    "int8-gemm": ("gemm", INT8),
    "dynamic": ("masked", {"format": "dynamic-int8"}),
    "mixed": ("chain", {"target_size": "1MB"}),
    "rewritten": ("chain", {"format": "qdq-int8", "equalize": True, "split_outliers": True, "twin_ranges": True}),
    "streamed": ("chain", {"max_memory": "1kB"}),
    "converted": ("old", {"format": "qdq"}),
    **{f"zoo-{name}": (name, {}) for name in ("if-both-branches", "scan", "if-in-a-loop", "loop-whose-rows-change", "opset-7")},
    **{f"zoo-{name}-qdq": (name, {"format": "qdq"}) for name in ("if-both-branches", "scan", "weights-in-a-branch", "recurrent")},
    **{f"zoo-{name}-int8": (name, INT8) for name in ("names-in-both-branches", "loop-with-carried-state")},
    **{
        name: (name, {})
        for name in (
            *("conv-in-both-branches", "conv-in-an-if-in-a-scan", "conv-transpose-groups-fold", "conv-transpose-groups-dequantize"),
            *("table-in-both-branches-dequantize", "table-gather-block-quantized-8", "weight-shared-by-two-layers"),
            *("experts-with-their-own-inputs", "gemm-transposed-input", "gemm-constant-left-and-matrix-added", "einsum-heads-in"),
            *("quantized-by-block-again", "function-called-twice-with-different-weights", "branch-in-a-function-called-twice"),
        )
    },
}


def case(name: str) -> tuple[onnx.ModelProto, list[Feeds], dict[str, Any]]:
    """A model, batches for it and options it is about."""
    if name in OWN:
        model = OWN[name]()
        return proto(model), [graphs.feeds(model, seed=i) for i in range(4)], {}
    rng = np.random.default_rng(0)
    return ZOO[name].build(), [ZOO[name].feeds(rng) for _ in range(4)], dict(ZOO[name].options)


def bodies(nodes: Any) -> list[onnx.GraphProto]:
    direct = [g for node in nodes for a in node.attribute for g in (*a.graphs, *([a.g] if a.type == onnx.AttributeProto.GRAPH else []))]
    return [inner for body in direct for inner in (body, *bodies(body.node))]


def every_name(model: onnx.ModelProto) -> set[str]:
    found: set[str] = set()
    for graph in (model.graph, *bodies(model.graph.node)):
        found |= {v.name for v in (*graph.input, *graph.initializer)}
        found |= {name for node in graph.node for name in (node.name, *node.output)}
    return found - {""}


def occupy(model: onnx.ModelProto, taken: list[str]) -> onnx.ModelProto:
    """A copy with more nodes, values and constants, called what is in ``taken``; they compute ones, or hand on what a body puts out."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    inner = [b for b in bodies(copy.graph.node) if b.output and b.output[0].name in {o for n in b.node for o in n.output}]
    places = 3 if inner else 2
    graph, end = copy.graph, "hostile start"
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), end))
    for name in taken[0::places]:
        graph.node.append(onnx.helper.make_node("Identity", [end], [name], name=name))
        end = name
    for i, name in enumerate(taken[1::places]):
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), name))
        graph.node.append(onnx.helper.make_node("Mul", [end, name], [f"hostile {i}"], name=f"hostile {i}"))
        end = f"hostile {i}"
    graph.output.append(onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [1]))
    for i, name in enumerate(taken[2::3] if inner else []):
        body = inner[i % len(inner)]
        body.node.append(onnx.helper.make_node("Identity", [body.output[0].name], [name], name=name))
        body.output[0].name = name
    return copy


def outputs(path: Path, feeds: Feeds, count: int) -> list[Array]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, dict(feeds))[:count]]


@pytest.mark.parametrize("run", RUNS)
def test_numbers_do_not_depend_on_names_that_are_taken(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, options = case(RUNS[run][0])
    options |= RUNS[run][1]
    made: dict[str, None] = {}
    take = names._Taken.take

    def recorded(self: names._Taken, base: str) -> str:
        made[name := take(self, base)] = None
        return name

    paths = [tmp_path / f"{i}" / "q.onnx" for i in range(2)]
    for path in paths:
        path.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(names._Taken, "take", recorded)
        first = magr_onnx.optimize(model, data, output=paths[0], **options).report
    made |= dict.fromkeys(sorted(every_name(onnx.load(paths[0]))))
    taken = [name for name in made if name not in every_name(model)]
    assert taken
    hostile = occupy(model, taken)
    onnx.checker.check_model(hostile, full_check=True)
    second = magr_onnx.optimize(hostile, data, output=paths[1], **options).report
    assert len(first.layers) == len(second.layers)
    onnx.checker.check_model(str(paths[1]))
    count = len(model.graph.output)
    for one, two in zip(*(outputs(path, data[0], count) for path in paths), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", ["qdq", "qdq-int8"])
@pytest.mark.parametrize("name", ["masked", "chain"])
def test_requantizing_the_own_output(name: str, first: str, second: str, tmp_path: Path) -> None:
    model, data, _ = case(name)
    paths = [tmp_path / f"{i}.onnx" for i in range(2)]
    magr_onnx.optimize(model, data, output=paths[0], format=first, bits=8)
    report = magr_onnx.optimize(paths[0], data, output=paths[1], format=second, requantize=True, bits=8).report
    assert len(report.layers) == (3 if name == "masked" else 2)
    floats = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, dict(data[0]))
    for out, exact in zip(outputs(paths[1], data[0], len(floats)), floats, strict=True):
        # ranges from four batches are wider than what was seen in them, which costs resolution on these
        assert np.linalg.norm(out - np.asarray(exact)) <= 0.06 * np.linalg.norm(np.asarray(exact))
