"""The files we write, small ones and the bundled language model, as jobs for the targets.

A new format gets its line in `FILES`, and with it every test of test_edge.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import magr_onnx
from magr_onnx.config.options import Options
from magr_onnx.models import bundled
from tests.edge.jobs import Array, Job
from tests.graphs import Builder, correlated, proto, random
from tests.helpers import PATIENCE

K, WIDTH, N = 96, 64, 24


@dataclass(frozen=True, slots=True)
class File:
    """How to write a file, and what to hold its answers against.

    Attributes:
        options: Of `magr_onnx.optimize`.
        int8: Whether onnxruntime may compute it with int8 activations.
        in_float: The name of the file that has the same codes and is float arithmetic as written; empty for this file itself.
    """

    options: Options
    int8: bool = False
    in_float: str = ""


FAST: Options = {"effort": "fast"}  # with error feedback the codes of later layers would follow the arithmetic of the layers before
FILES = {
    "matmulnbits-4": File({"bits": 4, **FAST}),
    "matmulnbits-4-channel": File({"bits": 4, "block_size": None}),
    "matmulnbits-4-int8": File({"bits": 4, "accuracy_level": 4, **FAST}, True, "matmulnbits-4"),
    "matmulnbits-2": File({"bits": 2, **FAST}),
    "matmulnbits-2-int8": File({"bits": 2, "accuracy_level": 4, **FAST}, True, "matmulnbits-2"),
    "matmulnbits-8": File({"bits": 8, **FAST}),
    "matmulnbits-8-int8": File({"bits": 8, "accuracy_level": 4, **FAST}, True, "matmulnbits-8"),
    "qdq-4": File({"bits": 4, "format": "qdq"}, True),
    "qdq-8": File({"bits": 8, "format": "qdq"}, True),
    "qdq-8-channel": File({"bits": 8, "format": "qdq", "block_size": None}, True),
    "qdq-int8": File({"format": "qdq-int8", "target": "x86-avx2"}, True),
    "qdq-int8-4": File({"format": "qdq-int8", "bits": 4, "accumulator_bits": 16, "accumulator_tile": 64}, True),
    "dynamic-int8": File({"format": "dynamic-int8", "target": "x86-avx2"}, True),
}
LANGUAGE_MODELS = {f"language-model-{bits}": File({"bits": bits, "quantizer": "rtn", "alpha": 0.0}) for bits in (4, 2)}
ALL = FILES | LANGUAGE_MODELS

ORT_STYLES = {"fixed": (".ort", {}), "runtime": (".with_runtime_opt.ort", {"session.enable_saved_runtime_optimizations": "1"})}
"""The styles of onnxruntime's converter: the suffix of its file, and the configuration that file is loaded with."""


def perceptron() -> ir.Model:
    """Two layers with biases, a Relu between, on sequences."""
    b = Builder()
    x = b.input("x", ["batch", "time", K])
    up = b.node("Add", [b.node("MatMul", [x, b.constant("w1", random(K, WIDTH))]), b.constant("b1", random(WIDTH, seed=1))])
    down = b.node("MatMul", [b.node("Relu", [up]), b.constant("w2", random(WIDTH, N, seed=2))])
    return b.model(b.node("Add", [down, b.constant("b2", random(N, seed=3))]), ["batch", "time", N])


def write(folder: Path) -> dict[str, Job]:
    """Quantize everything; the models by name."""
    x = correlated(200, K).reshape(50, 4, K)
    source, calibration = proto(perceptron()), [{"x": x}]
    for name, file in FILES.items():
        magr_onnx.optimize(source, calibration, output=folder / f"{name}.onnx", **file.options)
    for name, file in LANGUAGE_MODELS.items():
        magr_onnx.optimize(bundled.MODEL, output=folder / f"{name}.onnx", **file.options)
    with np.load(bundled.HELD_OUT) as arrays:
        tokens: dict[str, Array] = {name: arrays[name][:1, :32] for name in arrays}
    small = {name: Job(folder / f"{name}.onnx", {"x": x[:3]}) for name in FILES}
    return small | {name: Job(folder / f"{name}.onnx", tokens) for name in LANGUAGE_MODELS}


def to_ort(folder: Path) -> None:
    """Convert all ``.onnx`` files of a folder in every style. In a process of its own: the converter leaves files open."""
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
