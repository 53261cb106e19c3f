"""A provider that is added from outside: an object and an entry in the registry, and every step of a run follows it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import OptionError, ProviderError
from magr_onnx.passes import Plan
from magr_onnx.passes.providers import PROVIDERS, Provider, find_provider
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import feeds, proto

LOADED: list[str] = []


def refuses(spec: WeightSpec) -> list[str]:
    return ["asymmetric grids on npu: its kernels have no zero points; use symmetric"] if not spec.symmetric else []


def preload(onnxruntime: ModuleType) -> None:
    LOADED.append(onnxruntime.__name__)


NPU = Provider("npu", "CPUExecutionProvider", refuses, largest_block=64, preload=preload)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, NPU.name, NPU)


def test_a_run_keeps_to_what_the_provider_takes(tmp_path: Path) -> None:
    model = graphs.matmul(256, 32)
    out = tmp_path / "q.onnx"
    with pytest.raises(OptionError, match="asymmetric grids on npu"):
        magr_onnx.optimize(proto(model), [feeds(model)], output=out, provider="npu")
    report = magr_onnx.optimize(
        proto(model), [feeds(model)], output=out, provider="npu", symmetric=True, block_size=256, validation_data=[feeds(model)]
    ).report
    (node,) = (n for n in ir.load(out).graph if n.op_type == "MatMulNBits")
    assert node.attributes["block_size"].as_int() == 64
    assert "largest_block=64" in report.pipeline
    assert report.validation is not None
    assert LOADED == ["onnxruntime"]


def test_choices_of_a_budget_and_options_of_layers_are_checked_too() -> None:
    model = graphs.matmul(256, 32)
    with pytest.raises(OptionError, match="asymmetric grids on npu"):
        magr_onnx.optimize(proto(model), [feeds(model)] * 4, provider="npu", target_size="50%")
    layers = [{"match": "*", "symmetric": False}]
    with pytest.raises(OptionError, match="asymmetric grids on npu"):
        magr_onnx.optimize(proto(model), [feeds(model)], provider="npu", symmetric=True, layers=layers)


def test_providers_are_found_by_either_name() -> None:
    assert find_provider("NPU") is NPU
    assert find_provider("cudaexecutionprovider") is PROVIDERS["cuda"] is find_provider("cuda")
    other = find_provider("CoreMLExecutionProvider")
    assert other.onnxruntime == "CoreMLExecutionProvider"
    plan = Plan.parse("quantize{bits=2},emit-matmulnbits")
    assert plan.problems("CoreMLExecutionProvider") == []
    assert plan.suited("CoreMLExecutionProvider") == plan


def test_one_that_is_not_there_lists_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "tpu", Provider("tpu", "TPUExecutionProvider"))
    with pytest.raises(ProviderError) as caught, Session(graphs.matmul(), "tpu"):
        pass
    assert all(name in str(caught.value) for name in ("'tpu'", *ort.get_available_providers()))


def test_everything_wrong_with_options_and_provider_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "tpu", Provider("tpu", "TPUExecutionProvider", refuses))
    model = graphs.matmul()
    with pytest.raises(OptionError) as caught:
        magr_onnx.optimize(proto(model), [feeds(model)], provider="tpu", quantizer="gtpq", format="qdp")
    assert len(caught.value.problems) == 3
    assert all(
        text in str(caught.value) for text in ("3 problems:", "did you mean 'gptq'?", "did you mean 'qdq'", "'tpu' is not available")
    )
    for options in ({}, {"pipeline_text": "quantize,emit-matmulnbits"}):
        with pytest.raises(OptionError) as caught:
            magr_onnx.optimize(proto(model), [feeds(model)], provider="tpu", **options)  # type: ignore[arg-type]
        assert [text.partition(" ")[0] for text in caught.value.problems] == ["asymmetric", "provider"]
    with pytest.raises(ProviderError, match="'tpu' is not available"):
        magr_onnx.optimize(proto(model), [feeds(model)], provider="tpu", symmetric=True)


@pytest.mark.parametrize("name", ["cudaa", "CUDAExecutionProvidr"])
def test_an_unknown_provider_gets_a_suggestion(name: str) -> None:
    with pytest.raises(ProviderError, match="did you mean 'cuda'"):
        magr_onnx.optimize(graphs.matmul(), provider=name)


def test_layers_whose_last_block_is_short_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the provider needs whole blocks behind DequantizeLinear; a layer's own block size, and MatMulNBits, are taken."""
    monkeypatch.setitem(PROVIDERS, NPU.name, Provider("npu", "CPUExecutionProvider", whole_blocks=True))
    model = graphs.matmul(48, 32)
    with pytest.raises(OptionError, match="48 rows are no multiple of blocks of 32"):
        magr_onnx.optimize(proto(model), [feeds(model)], provider="npu", format="qdq")
    for options in ({"block_size": 16}, {"block_size": None}, {"layers": [{"match": "*", "block_size": 16}]}):
        magr_onnx.optimize(proto(model), [feeds(model)], provider="npu", format="qdq", progress=False, **options)  # type: ignore[arg-type]
    magr_onnx.optimize(proto(model), [feeds(model)], provider="npu", progress=False)
