"""Seconds of every solver on layers of the shapes of language models, on one device.

    python tests/benchmarks/devices.py [--device cpu|cuda|torch-cpu] [--shapes 1024x4096,4096x11008] [--repeats 3] [--json FILE]

Weights are heavy-tailed, inputs correlated (64 common factors), 4 bits in blocks of 32. ``gram`` is ``X^T X`` of 2048 rows; ``factor``
the factorization for GPTQ, ``round`` GPTQ itself on a searched grid, ``sweep`` one sweep of coordinate descent with scale refits,
``regrid`` one pass of grid refits, ``magr`` MagR with its stopping rule. What is copied to and from the device counts in ``layer`` alone:
quantizer comq from NumPy statistics to NumPy codes. ``error`` is the layer error of its result over that of the nearest codes on min-max
grids, in float64 by NumPy: the same on every device but for rounding.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import header, interleaved, progress, table, write_json

from magr_onnx.core import backends, magr
from magr_onnx.core.backends import Backend
from magr_onnx.core.grid import minmax, search
from magr_onnx.core.linalg import damped, layer_error
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, comq, gptq
from magr_onnx.core.quantizers.grid_refinement import regrid
from magr_onnx.core.types import Array, LayerStats, WeightSpec

SHAPES = "1024x1024,1024x4096,2048x2048,4096x4096,4096x11008,8192x8192,11008x4096"
ROWS = 2048
SPEC = WeightSpec(4, 32)


def problem(k: int, n: int) -> tuple[Array, Array]:
    """Rows ``(ROWS, k)`` and weights ``(k, n)``, float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 64), np.float32) @ rng.standard_normal((64, k), np.float32)
    x = (0.5 * x + 4 * rng.standard_normal((ROWS, k), np.float32)) * np.exp(0.3 * rng.standard_normal(k)).astype(np.float32)
    return x, (0.05 * rng.standard_t(4, (k, n))).astype(np.float32)


def seconds(b: Backend, work: Callable[[], Any], repeats: int) -> float:
    """The median time of some work, after a run that loads what it needs."""

    def finished() -> None:
        work()
        b.wait()

    return statistics.median(interleaved([finished], repeats)[0])


def measure(k: int, n: int, b: Backend, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    x, weights = problem(k, n)
    rows, w = b.array(x), b.array(weights)
    gram = b.product(rows.T, rows) / ROWS
    h = damped(gram, 0.1)
    feedback, grid = gptq.prepare(gram, 0.1), search(w, SPEC, b.host(gram.diagonal()))
    start = gptq.solve(w, feedback, grid)
    row: dict[str, Any] = {"K": k, "N": n}
    works: dict[str, Callable[[], Any]] = {
        "gram": lambda: b.product(rows.T, rows),
        "magr": lambda: magr.reduce(w, h, alpha=1e-4, group_size=32),
        "grid": lambda: search(w, SPEC, b.host(gram.diagonal())),
        "factor": lambda: gptq.prepare(gram, 0.1),
        "round": lambda: gptq.solve(w, feedback, grid),
        "sweep": lambda: comq.refine(w, start, h, sweeps=1, error=1.0),
        "regrid": lambda: regrid(w, start, h),
    }
    for name, work in works.items():
        row[name] = seconds(b, work, repeats)
    host = (x.astype(np.float64).T @ x.astype(np.float64)) / ROWS
    found: list[Any] = []

    def layer() -> None:
        stats = LayerStats(host, np.zeros(k), ROWS, backend=b)
        found[:] = [QUANTIZERS["comq"].run(Problem(weights, weights, stats, False, SPEC), Options(damping=0.1)).weight]

    row["layer"] = seconds(b, layer, 1)
    nearest = minmax(weights, SPEC)
    errors = (layer_error(q.dequantize() - weights, host) for q in (found[0], nearest.weight(nearest.codes(weights))))
    row["error"] = next(errors) / next(errors)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help=backends.DEVICES)
    parser.add_argument("--shapes", default=SHAPES, help="KxN, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything measured to a file")
    args = parser.parse_args()
    b = backends.find(args.device)
    print(header(f"solvers on {b.name} ({b.described}), seconds"))
    measured = []
    with b.exact():
        for shape in args.shapes.split(","):
            progress(shape)
            k, n = map(int, shape.split("x"))
            measured.append(measure(k, n, b, args.repeats))
            write_json(args.json, measured)
    names = list(measured[0])
    print(table(names, [[row[name] if name in ("K", "N") else f"{row[name]:.3g}" for name in names] for row in measured]))


if __name__ == "__main__":
    main()
