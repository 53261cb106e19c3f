"""Whole graphs for Qualcomm's NPU: our `qdq-full` files against those of onnxruntime's get_qnn_qdq_config, with the same types.

    python tests/benchmarks/npu.py FOLDER ... [--npu PYTHON]

Every FOLDER has ``model.onnx``, ``calibration.npz`` and ``heldout.npz``. Both tools get 64 calibration samples; theirs gets the model with
a batch of 1, as it asks for. SQNR is that of all outputs on the held-out inputs, of the files as written (onnxruntime's optimizations off:
its CPU provider would round 16-bit activations to 8). With ``--npu``, the Python that ``.ci/edge npu`` made (``.edge/npu/bin/python``), the
first 16 inputs also run on the emulator of architecture v73.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from common import Feeds, header, quiet, table
from onnxruntime.capi import onnxruntime_pybind11_state

import magr_onnx

Array = npt.NDArray[Any]

CALIBRATION, ON_NPU = 64, 16
KINDS = {"A8W8": ("uint8", 8), "A16W8": ("uint16", 8), "A8W4": ("uint8", 4), "A16W4": ("uint16", 4)}
MIXED = 0.1  # share of the work in 16 bits
SCRIPT = Path(__file__).resolve().parents[1] / "edge/npu.py"


def decibels(actual: Array, expected: Array) -> float:
    """Signal to noise over all outputs, in dB."""
    exact = expected.astype(np.float64)
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - actual).sum()))


def with_one_sample(source: Path, path: Path) -> None:
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.HasField("dim_value"):
            first.dim_value = 1
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def theirs(source: Path, feeds: Feeds, kind: str, bits: int, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            count = len(next(iter(feeds.values())))
            self.samples = iter([{name: array[i : i + 1] for name, array in feeds.items()} for i in range(count)])

        def get_next(self) -> Feeds | None:
            return next(self.samples, None)

    prepared = path.with_suffix(".prepared.onnx")
    start = prepared if qnn_preprocess_model(source, prepared) else source
    activations = QuantType.QUInt8 if kind == "uint8" else QuantType.QUInt16
    weights: dict[str, Any] = {"weight_type": QuantType.QUInt8} if bits == 8 else {"weight_type": QuantType.QInt4, "per_channel": True}
    config = get_qnn_qdq_config(start, Reader(), activation_type=activations, **weights)
    quantize(start, path, config)


def outputs(path: Path, feeds: Feeds) -> Array:
    """Run a file as written, sample by sample; all outputs as rows."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = []
    for i in range(len(next(iter(feeds.values())))):
        rows.append(np.concatenate([y.ravel() for y in session.run(None, {name: a[i : i + 1] for name, a in feeds.items()})]))
    return np.stack(rows)


def on_npu(python: Path, path: Path, feeds: Feeds, folder: Path) -> tuple[Array, str]:
    """Run a file on the emulator; its outputs as rows, and how many partitions and operators of the CPU there are."""
    np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
    (folder / "jobs.json").write_text(json.dumps([{"model": str(path), "feeds": str(folder / "feeds.npz"), "architecture": "73"}]))
    for old in ("0.npz", "0.json", "0.error"):
        (folder / old).unlink(missing_ok=True)
    subprocess.run([python, SCRIPT, folder], check=True, capture_output=True)
    if (folder / "0.error").exists():
        return np.zeros((0, 0)), (folder / "0.error").read_text().splitlines()[0][:80]
    arrays = dict(np.load(folder / "0.npz"))
    ran = json.loads((folder / "0.json").read_text())
    on_cpu = sum(provider == "CPUExecutionProvider" for _, provider in ran)
    rows = np.concatenate([y.reshape(len(y), -1) for y in arrays.values()], axis=1)
    return rows, f"{len(ran) - on_cpu} on the NPU, {on_cpu} on the CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--npu", type=Path, help="Python with onnxruntime-qnn")
    arguments = parser.parse_args()
    print(header("npu.py"))
    rows = []
    for folder in arguments.folders:
        calibration = {name: a[:CALIBRATION] for name, a in np.load(folder / "calibration.npz").items()}
        held_out = dict(np.load(folder / "heldout.npz"))
        few = {name: a[:ON_NPU] for name, a in held_out.items()}
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            with_one_sample(folder / "model.onnx", work / "float.onnx")
            expected = outputs(work / "float.onnx", held_out)
            for types, (kind, bits) in KINDS.items():
                with quiet():
                    theirs(work / "float.onnx", calibration, kind, bits, work / "theirs.onnx")
                options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "activation_type": kind}
                options |= {"effort": "balanced", "bits": bits, "conv_bits": bits} if bits < 8 else {}
                magr_onnx.optimize(folder / "model.onnx", calibration, output=work / "ours.onnx", **options)
                tools = {"ours": types, "theirs": types}
                if (kind, bits) == ("uint8", 8):
                    tools["mixed"] = f"{types}, {MIXED:.0%} in A16"
                    options["wide_activations"] = MIXED
                    magr_onnx.optimize(folder / "model.onnx", calibration, output=work / "mixed.onnx", **options)
                for tool, what in tools.items():
                    path = work / f"{tool}.onnx"
                    try:
                        row = [folder.name, what, tool, f"{decibels(outputs(path, held_out), expected):.1f}"]
                    except onnxruntime_pybind11_state.InvalidArgument:  # rounded positions choose rows that there are not
                        row = [folder.name, what, tool, "-"]
                    if arguments.npu is not None:
                        real, where = on_npu(arguments.npu, path, few, work)
                        row += [f"{decibels(real, expected[:ON_NPU]):.1f}" if real.size else "-", where]
                    rows.append(row)
                    print(*row, flush=True)
    print(table(["network", "types", "tool", "dB", *(["dB on the NPU", "where"] if arguments.npu is not None else [])], rows))


if __name__ == "__main__":
    main()
