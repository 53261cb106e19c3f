"""The comparison with other tools: what it counts as quantized, and that its helpers change no answer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import magr_onnx
from magr_onnx.runtime.ort.session import Session
from tests import graphs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (BENCHMARKS, BENCHMARKS / "rivals"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("rivals")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_is_on_a_grid_only_if_every_block_is(rivals: ModuleType, bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (80, 6))  # two and a half blocks
    weight = (codes * np.repeat([[0.1], [0.3], [0.7]], 32, axis=0)[:80]).astype(np.float32)
    assert rivals.on_grid(weight, bits, 32)
    assert not rivals.on_grid(weight, bits - 1, 32)
    weight[:, 2] = np.linspace(-1, 1, 80)
    assert not rivals.on_grid(weight, bits, 32)


@pytest.mark.parametrize("format", ["matmulnbits", "qdq"])
def test_layers_are_counted_in_either_format(rivals: ModuleType, tmp_path: Path, format: str) -> None:
    model = graphs.chain(64, 32)
    source, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(graphs.proto(model).SerializeToString())
    setting = rivals.Setting(4, 32)
    assert rivals.count_layers(source, setting)[0] == 0
    magr_onnx.optimize(source, [graphs.feeds(model)], output=output, bits=4, block_size=32, format=format)
    quantized, layers = rivals.count_layers(output, setting)
    assert quantized == layers == rivals.count_layers(source, setting)[1] > 0
    assert rivals.count_layers(output, rivals.Setting(2, 32))[0] == 0


def test_weights_are_found_behind_nodes_and_transposes(rivals: ModuleType) -> None:
    weight = graphs.random(24, 40)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("Gemm", ["x", "w"], ["b"], transB=1),
        helper.make_node("MatMul", ["x", "a"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [None, 40])],
        [value("y", TensorProto.FLOAT, None), value("b", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    found = rivals.constant_weights(model)
    assert len(found) == 2  # not the product of two activations
    for array in found:
        np.testing.assert_array_equal(array, weight.T)


def test_padding_changes_no_answer(rivals: ModuleType, tmp_path: Path) -> None:
    adapter = importlib.import_module("adapter")
    model = graphs.chain(48, 32)
    path = tmp_path / "padded.onnx"
    padded = adapter.padded(graphs.proto(model), 32)
    onnx.save(padded, str(path))
    assert {t.dims[0] % 32 for t in padded.graph.initializer if len(t.dims) == 2} == {0}
    feeds = graphs.feeds(model)
    with Session(model) as a, Session(path) as b:
        np.testing.assert_allclose(b.run(feeds)[0], a.run(feeds)[0], rtol=1e-5, atol=1e-6)


def test_an_adapter_runs_and_fails_with_a_reason(rivals: ModuleType, tmp_path: Path) -> None:
    tool = rivals.find_tool("onnxruntime", sys.executable)
    assert tool.version == ort.__version__
    source, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = graphs.matmul(64, 32)
    source.write_bytes(graphs.proto(model).SerializeToString())
    np.savez(tmp_path / "inputs.npz", **graphs.feeds(model))
    arguments = (*tool.command, str(source), str(tmp_path / "inputs.npz"), str(output))
    assert rivals.run((*arguments, "2", "32", "default"), 300)[1] is None
    assert rivals.count_layers(output, rivals.Setting(2, 32)) == (1, 1)
    assert "4 bits" in rivals.run((*arguments, "2", "32", "k_quant"), 300)[1]


def test_a_tool_without_its_environment_is_not_installed(rivals: ModuleType, tmp_path: Path) -> None:
    assert not rivals.find_tool("onnxruntime", str(tmp_path / "python")).methods
