"""`qdq-full` files on the emulator of Qualcomm's NPU: one partition, and what the CPU computes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from tests.edge.targets import FOLDER, refuse
from tests.workflow.test_integer_convolutions import images, network, sqnr
from tests.workflow.test_qdq_full import decoder, run, sequences, transformer

PYTHON = FOLDER / "npu/bin/python"
NETWORKS = {"convolutions": (network, images), "transformer": (transformer, sequences), "decoder in pieces": (decoder, sequences)}
KINDS: dict[str, dict[str, Any]] = {
    "uint8": {"activation_type": "uint8"},
    "mixed": {"wide_activations": 0.3},
    "uint16": {"activation_type": "uint16"},
    "int4 uint8": {"activation_type": "uint8", "bits": 4, "conv_bits": 4, "quantizer": "rtn"},
    "int4 uint16": {"activation_type": "uint16", "bits": 4, "conv_bits": 4, "quantizer": "rtn"},
}
CASES = [(name, kind, arch) for name in NETWORKS for kind in KINDS for arch in ("68", "73")]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Files by name and type of activations; those of type ``float`` are the originals."""
    folder = tmp_path_factory.mktemp("npu")
    paths = {}
    for name, (make, inputs) in NETWORKS.items():
        proto = make()
        paths[name, "float"] = folder / f"{name}.onnx"
        onnx.save(proto, paths[name, "float"])
        for kind, of_kind in KINDS.items():
            path = paths[name, kind] = folder / f"{name}-{kind}.onnx"
            options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "batch_size": 4, **of_kind}
            magr_onnx.optimize(proto, {"x": inputs(64, 1)}, output=path, **options)
    return paths


@pytest.fixture(scope="module")
def answers(files: dict[tuple[str, str], Path]) -> dict[tuple[str, str, str], tuple[Array, list[list[str]]]]:
    if not PYTHON.exists():
        refuse("npu", f"{PYTHON} is not installed (.ci/edge does it)")
    folder = next(iter(files.values())).parent
    for name, (_, inputs) in NETWORKS.items():
        np.savez(folder / f"{name}.npz", x=inputs(8, 2))
    jobs = [{"model": str(files[name, kind]), "feeds": str(folder / f"{name}.npz"), "architecture": arch} for name, kind, arch in CASES]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("npu.py")
    process = subprocess.run([PYTHON, script, folder], capture_output=True, text=True, timeout=900, check=False, cwd=folder)
    results = {}
    for index, case in enumerate(CASES):
        error = folder / f"{index}.error"
        assert (folder / f"{index}.npz").exists(), error.read_text() if error.exists() else process.stderr[-2000:]
        (output,) = np.load(folder / f"{index}.npz").values()
        results[case] = output, json.loads((folder / f"{index}.json").read_text())
    return results


@pytest.mark.parametrize(("name", "kind", "arch"), CASES)
def test_all_but_the_rounding_of_inputs_and_outputs_runs_on_the_npu(name: str, kind: str, arch: str, answers: Any) -> None:
    _, ran = answers[name, kind, arch]
    assert [operator for operator, provider in ran if provider == "CPUExecutionProvider"] == ["QuantizeLinear", "DequantizeLinear"]
    assert len(ran) == 3, ran  # one partition


@pytest.mark.parametrize(("name", "kind", "arch"), CASES)
def test_the_npu_computes_what_the_cpu_does(name: str, kind: str, arch: str, answers: Any, files: dict[tuple[str, str], Path]) -> None:
    x = NETWORKS[name][1](8, 2)
    actual, _ = answers[name, kind, arch]
    expected = run(files[name, kind], "x", x)
    reference = run(files[name, "float"], "x", x)
    quality = sqnr(expected, reference), sqnr(actual, reference), sqnr(actual, expected)
    assert quality[1] > (12 if "int4" in kind else 30 if kind == "uint16" else 20), quality
    assert quality[2] > (30 if kind == "uint16" else 20), quality
