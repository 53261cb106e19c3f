"""Layers of far more inputs than calibration rows: processor time, memory and accuracy of a model of keywords with one wide layer.

    python tests/benchmarks/wide.py [--shapes 18048x32:60 4230x64:64] [--formats dynamic-int8 default] [--trees PATH ...]

The model is two convolutions of spectrograms, a Gemm ``K x N`` on all they give, and a Gemm to 12 outputs, with random weights; ``K`` is a
multiple of 282. Of every shape it is quantized from so many samples (behind the colon), in a process of its own with one BLAS thread, whose
processor time and peak memory are measured, imports and all. The SQNR is that of the outputs on 300 fresh samples. ``--trees`` measures
other checkouts of this project too; the first columns are this one's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from common import Cell, header, progress, table
from onnx import TensorProto, helper, numpy_helper

from magr_onnx.runtime.ort.session import Session

Array = npt.NDArray[Any]

TREE = Path(__file__).parents[2]
HEIGHT, WIDTH, CLASSES, FRESH = 98, 16, 12, 300
POSITIONS = 47 * 6  # of the last convolution
RUN = "import sys, magr_onnx; magr_onnx.optimize(sys.argv[1], sys.argv[2], output=sys.argv[3], progress=False, **eval(sys.argv[4]))"


def build(path: Path, k: int, n: int) -> None:
    """Write the model."""
    rng = np.random.default_rng(0)
    channels = k // POSITIONS
    arrays = {
        "kernel_1": 0.3 * rng.standard_normal((32, 1, 5, 5)),
        "bias_1": 0.1 * rng.standard_normal(32),
        "kernel_2": 0.08 * rng.standard_normal((channels, 32, 3, 3)),
        "bias_2": 0.1 * rng.standard_normal(channels),
        "wide": 0.01 * rng.standard_t(4, (channels * POSITIONS, n)),
        "bias_3": 0.1 * rng.standard_normal(n),
        "head": 0.2 * rng.standard_normal((n, CLASSES)),
        "bias_4": np.zeros(CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel_1", "bias_1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "kernel_2", "bias_2"], ["c"], name="second", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "wide", "bias_3"], ["f"], name="wide"),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "head", "bias_4"], ["y"], name="head"),
    ]
    ends = (("x", ["n", 1, HEIGHT, WIDTH]), ("y", ["n", CLASSES]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends)
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "keywords", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def samples(count: int, seed: int) -> Array:
    """Waves of 12 kinds of any phase in noise, ``(count, 1, HEIGHT, WIDTH)``."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, CLASSES, count)[:, None, None]
    rows, columns = np.linspace(0, 1, HEIGHT)[:, None], np.linspace(0, 1, WIDTH)
    waves = np.sin(6 * rows * (1 + kind % 4) + 5 * columns * (1 + kind // 4) + rng.uniform(0, 1, (count, 1, 1)))
    return (waves + 0.5 * rng.standard_normal(waves.shape))[:, None].astype(np.float32)


def measured(tree: Path, folder: Path, form: str, seconds: int) -> list[Cell]:
    """Processor seconds, peak memory in MB and SQNR in dB of a run; None where it did not end in time."""
    output = folder / "quantized.onnx"
    output.unlink(missing_ok=True)
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {"PYTHONPATH": str(tree.resolve())}
    options = repr({} if form == "default" else {"format": form})
    command = [sys.executable, "-c", RUN, str(folder / "model.onnx"), str(folder / "samples.npz"), str(output), options]
    limited = ["timeout", str(seconds), *command]
    process = subprocess.Popen(limited, cwd=folder, env=os.environ | variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return [f"over {seconds} s" if process.returncode == 124 else "failed", None, None]
    fresh = {"x": samples(FRESH, 2)}
    results = []
    for path in (folder / "model.onnx", output):
        with Session(path) as session:
            results.append(session.run(fresh)[0].astype(np.float64))
    expected, actual = results
    sqnr = 10 * np.log10(np.square(expected).sum() / np.square(expected - actual).sum())
    return [f"{usage.ru_utime + usage.ru_stime:.1f}", f"{usage.ru_maxrss / 1024:.0f}", f"{sqnr:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["18048x32:60", "4230x64:64"], help="K x N : samples")
    parser.add_argument("--formats", nargs="+", default=["dynamic-int8", "default"])
    parser.add_argument("--trees", type=Path, nargs="*", default=[], help="other checkouts to compare with")
    parser.add_argument("--most-seconds", type=int, default=900, help="of a run (default 900)")
    args = parser.parse_args()
    trees = [TREE, *args.trees]
    rows: list[list[Cell]] = []
    for shape in args.shapes:
        size, count = shape.split(":")
        k, n = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            build(folder / "model.onnx", k, n)
            np.savez(folder / "samples.npz", x=samples(int(count), 1))
            for form in args.formats:
                progress(f"{shape} {form}")
                rows.append([size, count, form, *(cell for tree in trees for cell in measured(tree, folder, form, args.most_seconds))])
    print(header("Layers of more inputs than rows"))
    columns = [f"{tree.name}: {what}" for tree in trees for what in ("processor s", "MB", "SQNR dB")]
    print(table(["K x N", "samples", "format", *columns], rows))


if __name__ == "__main__":
    main()
