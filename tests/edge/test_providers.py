"""Files of every format on onnxruntime's providers OpenVINO and WebGPU: that they run, what stays on the CPU, and the CPU's numbers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import OptionError
from magr_onnx.passes.providers import PROVIDERS
from tests.edge.emitted import perceptron
from tests.edge.targets import FOLDER, refuse
from tests.graphs import Builder, correlated, matmul_bias, proto, random
from tests.workflow.test_integer_convolutions import images, network
from tests.workflow.test_qdq_full import sequences, transformer

Array = np.ndarray[Any, Any]
CPU = "CPUExecutionProvider"
DRIVER = Path("/usr/lib/chromium")  # SwiftShader, which computes what a GPU would


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider, and the Python that has it.

    Attributes:
        name: Of the provider.
        onnxruntime: What onnxruntime calls it.
        settings: Its options.
        environment: Variables that it needs.
        needs: A file beside the Python that it needs.
    """

    name: str
    onnxruntime: str
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    needs: Path = FOLDER

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin/python"


VULKAN = {"VK_ICD_FILENAMES": str(DRIVER / "vk_swiftshader_icd.json"), "LD_LIBRARY_PATH": str(DRIVER)}
OPENVINO = Provider("openvino", "OpenVINOExecutionProvider", ("device_type=CPU",))
WEBGPU = Provider("webgpu", "WebGpuExecutionProvider", (), VULKAN, DRIVER / "vk_swiftshader_icd.json")
EACH = pytest.mark.parametrize("provider", [OPENVINO, WEBGPU], ids=lambda provider: provider.name)


def embeddings() -> onnx.ModelProto:
    """A table, and a layer that reads its rows."""
    b = Builder()
    ids = b.input("x", ["batch", "seq"], ir.DataType.INT64)
    rows = b.node("Gather", [b.constant("table", random(96, 64)), ids])
    return proto(b.model(b.node("MatMul", [rows, b.constant("w", random(64, 24))]), ["batch", "seq", 24]))


def rows(count: int, seed: int) -> Array:
    return correlated(4 * count, 96, seed=seed).reshape(count, 4, 96)


def short_rows(count: int, seed: int) -> Array:
    return correlated(4 * count, 48, seed=seed).reshape(count, 4, 48)


def tokens(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 96, (count, 6))


NETWORKS: dict[str, tuple[Any, Any]] = {
    "layers": (lambda: proto(perceptron()), rows),
    "short": (lambda: proto(matmul_bias(48, 24)), short_rows),
    "convolutions": (network, images),
    "transformer": (transformer, sequences),
    "embeddings": (embeddings, tokens),
}
FULL = {"format": "qdq-full", "backend": "openvino"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "matmulnbits": ("layers", {}),
    "matmulnbits, int8 inputs": ("layers", {"accuracy_level": 4}),
    "matmulnbits, 8 bits": ("layers", {"bits": 8}),
    "matmulnbits, 2 bits": ("layers", {"bits": 2}),
    "matmulnbits, 2 bits, symmetric": ("layers", {"bits": 2, "symmetric": True}),
    "matmulnbits, short block": ("short", {}),
    "matmulnbits, convolutions": ("convolutions", {}),
    "matmulnbits, convolutions dequantized": ("convolutions", {"conv_form": "dequantize"}),
    "qdq": ("layers", {"format": "qdq"}),
    "qdq, 8 bits": ("layers", {"format": "qdq", "bits": 8}),
    "qdq, short block": ("short", {"format": "qdq"}),
    "qdq, channel": ("short", {"format": "qdq", "block_size": None}),
    "qdq-int8": ("layers", {"format": "qdq-int8"}),
    "qdq-int8, outputs": ("layers", {"format": "qdq-int8", "quantize_outputs": True}),
    "qdq-int8, 16 bits": ("layers", {"format": "qdq-int8", "wide_activations": 0.5}),
    "qdq-int8, convolutions": ("convolutions", {"format": "qdq-int8"}),
    "dynamic-int8": ("layers", {"format": "dynamic-int8"}),
    "dynamic-int8, rows": ("layers", {"format": "dynamic-int8", "row_ranges": True}),
    "qdq-full, convolutions": ("convolutions", FULL),
    "qdq-full": ("transformer", FULL),
    "qdq-full, convolutions, 4 bits": ("convolutions", {**FULL, "bits": 4, "conv_bits": 4}),
    "qdq-full, 4 bits": ("transformer", {**FULL, "bits": 4, "conv_bits": 4}),
    "embeddings": ("embeddings", {"embeddings": "gather-block-quantized"}),
    "embeddings, dequantize": ("embeddings", {"embeddings": "dequantize"}),
}
REFUSED = {"openvino": {"matmulnbits, 2 bits": "cpu_convert", "qdq, short block": "block_size"}, "webgpu": {}}
"""What a provider does not load, and a word of its message."""
ON_CPU = {"openvino": {"GatherBlockQuantized"}, "webgpu": {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}}
"""What a provider leaves to the CPU that costs time there, whatever the file."""
SMALL = {"Cast", "Gather", "Max", "Round", "Sum"}
"""What it may leave beside that."""
STEPS, ROUNDED, EXACT = 2 / 255, 0.02, 1e-5
"""Most difference between the provider and the CPU, in units of the largest value: of static grids, where one of them rounds inputs of
layers (OpenVINO does it by itself, in any format), and where nothing is rounded but weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and their inputs."""
    path = tmp_path_factory.mktemp("providers")
    jobs = []
    for index, (name, options) in enumerate(CASES.values()):
        make, inputs = NETWORKS[name]
        model, feeds = path / f"{index}.onnx", path / f"{index}.feeds.npz"
        count = 1 if options.get("format") == "qdq-full" else 3  # shapes are fixed
        np.savez(feeds, x=inputs(count, 2))
        calibration = {"x": inputs(16, 1)}
        magr_onnx.optimize(make(), calibration, output=model, batch_size=4, quantizer="rtn", progress=False, **options)
        jobs.append({"model": str(model), "feeds": str(feeds)})
    (path / "jobs.json").write_text(json.dumps(jobs))
    return path


Answers = dict[str, tuple[Array, Array, list[list[str]]] | str]


@pytest.fixture(scope="module")
def answers_of(folder: Path) -> Any:
    """Runs all files on a provider, once: outputs there and on the CPU and what ran where; or what went wrong."""
    known: dict[str, Answers] = {}

    def answers(provider: Provider) -> Answers:
        if provider.name not in known:
            for part in (provider.python, provider.needs):
                if not part.exists():
                    refuse(provider.name, f"{part} is not installed (.ci/edge does it)")
            known[provider.name] = run(provider, folder)
        return known[provider.name]

    return answers


def run(provider: Provider, folder: Path) -> Answers:
    script = Path(__file__).with_name("providers.py")
    command = [provider.python, script, folder, folder / provider.name, provider.onnxruntime, *provider.settings]
    environment = {**os.environ, **(provider.environment or {})}
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=folder, env=environment)
    results: Answers = {}
    for index, case in enumerate(CASES):
        result, error = folder / provider.name / f"{index}.npz", folder / provider.name / f"{index}.error"
        assert result.exists() or error.exists(), process.stderr[-2000:]
        if error.exists():
            results[case] = error.read_text()
        else:
            with np.load(result) as arrays:
                results[case] = arrays["actual"], arrays["expected"], json.loads(result.with_suffix(".json").read_text())
    return results


@EACH
@pytest.mark.parametrize("case", CASES)
def test_files_run_there_and_give_the_numbers_of_the_cpu(provider: Provider, case: str, answers_of: Any) -> None:
    answer, word = answers_of(provider)[case], REFUSED[provider.name].get(case)
    if word is not None:
        assert isinstance(answer, str), "it runs now: the page and the provider say that it does not"
        assert word in answer
        return
    assert not isinstance(answer, str), answer
    actual, expected, _ = answer
    exact = provider is WEBGPU and not any(word in case for word in ("qdq-", "int8"))
    bound = EXACT if exact else STEPS if "qdq-" in case else ROUNDED
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


@EACH
@pytest.mark.parametrize("case", CASES)
def test_only_what_the_page_names_stays_on_the_cpu(provider: Provider, case: str, answers_of: Any) -> None:
    answer = answers_of(provider)[case]
    if isinstance(answer, str):
        return
    there = {operator for operator, where in answer[2] if where != CPU}
    here = {operator for operator, where in answer[2] if where == CPU}
    assert there
    assert here <= ON_CPU[provider.name] | SMALL
    if provider is WEBGPU and "int8" in CASES[case][1].get("format", ""):
        assert here & ON_CPU["webgpu"]


def test_what_openvino_refuses_is_refused_before_the_work() -> None:
    plan = magr_onnx.build_pipeline(bits=2)
    assert any("2 bits" in problem for problem in plan.problems("openvino"))
    assert plan.problems("webgpu") == magr_onnx.build_pipeline(bits=2, symmetric=True).problems("openvino") == []
    assert {"openvino", "webgpu"} <= set(PROVIDERS)


def test_the_backend_openvino_has_no_signed_activations() -> None:
    """OpenVINO is wrong behind a Concat of int8 codes; see docs/edge.md."""
    with pytest.raises(OptionError, match="int8 is not for openvino"):
        magr_onnx.optimize(network(), {"x": images(8, 1)}, activation_type="int8", **FULL)
