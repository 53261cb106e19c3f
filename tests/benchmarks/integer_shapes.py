"""Time of single linear layers in the 8-bit formats over that in float, by rows and shape.

    python tests/benchmarks/integer_shapes.py [--rows 1,16,128] [--shapes 24x64,64x10,...]

Every layer is a model of its own, of a MatMul and an Add, on one thread; ratios of the processor's time are medians of paired runs. A call
of onnxruntime is in them, about 7 microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import numpy as np
from common import Cell, header, interleaved, quiet, table
from kernels import parse_shapes

import magr_onnx
from magr_onnx.runtime.ort.session import Session
from tests.graphs import matmul_bias

FORMATS = ("qdq-int8", "dynamic-int8")
SHAPES = "24x64,64x10,64x64,128x128,128x512,384x384,384x1536,768x768,1536x384"
RUNS = 301


def measure(rows: int, k: int, n: int) -> list[Cell]:
    """A row of the table."""
    rng, model = np.random.default_rng(0), matmul_bias(k, n)
    batches = [{"x": rng.standard_normal((1, rows, k)).astype(np.float32)} for _ in range(4)]
    with quiet():
        made = [magr_onnx.optimize(model, batches, format=form, quantizer="rtn", bias="none", progress=False).model for form in FORMATS]
    sessions = [Session(each, threads=1) for each in (model, *made)]
    runs = [partial(session.run, batches[0]) for session in sessions]
    interleaved(runs, 10)
    times = interleaved(runs, RUNS, clock=time.thread_time)
    ratios = [statistics.median(a / b for a, b in zip(of_format, times[0], strict=True)) for of_format in times[1:]]
    return [rows, f"{k} x {n}", f"{1e6 * statistics.median(times[0]):.1f}", *(f"{ratio:.2f}" for ratio in ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16,128", help="rows of the input, comma-separated")
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes(SHAPES), help="K x N, comma-separated")
    args = parser.parse_args()
    print(header("Linear layers in 8 bits"))
    cells = [measure(rows, k, n) for rows in map(int, args.rows.split(",")) for k, n in args.shapes]
    print(table(("rows", "layer", "float, microseconds", *FORMATS), cells))


if __name__ == "__main__":
    main()
