"""MagR's solver against the authors' iteration: seconds and objective.

    python tests/benchmarks/magr_speed.py [--shapes 1024x1024,4096x1024] [--inputs moderate,strong] [--repeats 3]

Both minimise ``1/2 tr((W - W0)^T H (W - W0)) + a sum_n ||w_n||_inf`` over the columns of ``W (K, N)``, with the authors' penalty
``a = 1e-3 lambda_max(H)``, in one process, NumPy, float32, on the same threads. The authors' iteration is 200 plain proximal gradient
steps of length ``1 / lambda_max(H)`` whose prox sorts every column to project on the l1 ball; it is written here with output channels
in rows, so that it sorts along memory, and is not charged for the singular value decomposition its step length comes from.

Weights are heavy-tailed (Student t, 4 degrees of freedom). Inputs are correlated (64 common factors) and of log-normal magnitude, and one
in a hundred is an outlier. ``moderate`` resembles the layers of small encoders and language models (largest magnitude 7 to 9 times the
median), ``strong`` the outliers of large ones (40 to 60 times). Objectives and duality gaps are computed in float64, by the code in this
file, for both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Cell, header, interleaved, progress, spread, table, write_json

from magr_onnx.core import magr
from magr_onnx.core.linalg import lambda_max

Floats = npt.NDArray[np.floating[Any]]

ALPHA = 1e-3
AUTHORS_STEPS = 200
COUNTS = (5, 10, 15, 20, 30)
INPUTS = {"moderate": (0.3, 5.0), "strong": (1.0, 10.0)}  # spread of the log-normal, factor of the outliers


@dataclass(frozen=True, slots=True)
class Row:
    """One way to solve one problem."""

    shape: str
    inputs: str
    method: str
    iterations: int
    seconds: list[float]
    objective: float
    gap: float


def problem(k: int, n: int, inputs: str = "moderate", seed: int = 0) -> tuple[Floats, Floats]:
    """Seeded weights ``(k, n)`` float32 and Gram matrix ``(k, k)`` float64."""
    sigma, outlier = INPUTS[inputs]
    rng = np.random.default_rng(seed)
    rows = 2 * k
    x = 0.5 * rng.standard_normal((rows, 64)) @ rng.standard_normal((64, k)) + rng.standard_normal((rows, k))
    x *= np.exp(sigma * rng.standard_normal(k)) * np.where(rng.random(k) < 0.01, outlier, 1)
    weights = (0.02 * rng.standard_t(4, (k, n))).astype(np.float32)
    return weights, x.T @ x / rows


def project_l1(rows: Floats, radius: float) -> Floats:
    """Euclidean projection of every row on the l1 ball, by sorting (Duchi et al. 2008)."""
    magnitude = np.abs(rows)
    descending = np.sort(magnitude, axis=1)[:, ::-1]
    excess = np.cumsum(descending, axis=1) - np.float32(radius)
    index = np.arange(1, rows.shape[1] + 1, dtype=np.float32)
    support = np.maximum((descending * index > excess).sum(axis=1), 1)
    theta = np.take_along_axis(excess, support[:, None] - 1, axis=1) / support[:, None].astype(np.float32)
    projected: Floats = np.sign(rows) * np.maximum(magnitude - theta, 0)
    inside = magnitude.sum(axis=1) <= radius
    projected[inside] = rows[inside]
    return projected


def authors(weights: Floats, gram: Floats, alpha: float = ALPHA, steps: int = AUTHORS_STEPS) -> Floats:
    """The published iteration, on weights ``(K, N)``."""
    target = np.ascontiguousarray(weights.T)
    normalised = (gram / lambda_max(gram)).astype(np.float32)
    threshold = np.float32(alpha)
    w = target.copy()
    for _ in range(steps):
        v = w - (w - target) @ normalised
        w = v - threshold * project_l1(v / threshold, 1.0)
    return np.ascontiguousarray(w.T)


def judge(solution: Floats, weights: Floats, gram: Floats, a: float) -> tuple[float, float]:
    """Objective and relative duality gap of a solution, in float64."""
    d = (solution - weights).astype(np.float64)
    gradient = gram @ d
    quadratic = (d * gradient).sum(axis=0)
    primal = 0.5 * quadratic + a * np.abs(solution).max(axis=0).astype(np.float64)
    scale = np.minimum(1, a / np.maximum(np.abs(gradient).sum(axis=0), 1e-300))  # brings the gradient into the dual ball
    dual = -0.5 * scale**2 * quadratic - scale * (weights * gradient).sum(axis=0)
    return float(primal.sum()), float((primal - dual).sum() / primal.sum())


def measure(k: int, n: int, inputs: str, repeats: int, steps: int) -> list[Row]:
    """Rows of one problem: the authors' iteration, ours as soon as it is at or below, ours with its own stopping rule."""
    shape = f"{k} x {n}"
    progress(f"{shape}, {inputs}: making the problem")
    weights, gram = problem(k, n, inputs)
    a = magr.penalty(weights, gram, ALPHA, relative=False)

    def ours(count: int | None) -> magr.Reduction:
        if count is None:
            return magr.reduce(weights, gram, alpha=ALPHA, relative=False)
        return magr.reduce(weights, gram, alpha=ALPHA, relative=False, max_iterations=count, tolerance=0.0)

    progress(f"{shape}, {inputs}: the authors' {steps} steps")
    begin = time.perf_counter()
    reached = authors(weights, gram, steps=steps)
    first_run = time.perf_counter() - begin
    reference = judge(reached, weights, gram, a)
    solutions = {count: ours(count) for count in COUNTS}
    judged = {count: judge(s.weights, weights, gram, a) for count, s in solutions.items()}
    first = next((count for count in COUNTS if judged[count][0] <= reference[0]), None)
    label = "never at or below" if first is None else "first at or below"
    count = COUNTS[-1] if first is None else first
    default = ours(None)

    progress(f"{shape}, {inputs}: {repeats} timed rounds")
    mine: list[Callable[[], object]] = [lambda: ours(count), lambda: ours(None)]
    one, two = interleaved(mine, 1, warmup=0)  # beside the authors' run above: the first round
    functions: list[Callable[[], object]] = [lambda: authors(weights, gram, steps=steps), *mine]
    more = interleaved(functions, repeats - 1, warmup=0)
    times = [a + b for a, b in zip(([first_run], one, two), more, strict=True)]
    start = judge(weights, weights, gram, a)
    return [
        Row(shape, inputs, "start (W0)", 0, [], *start),
        Row(shape, inputs, "authors", steps, times[0], *reference),
        Row(shape, inputs, f"ours, {label}", count, times[1], *judged[count]),
        Row(shape, inputs, "ours, default stop", default.iterations, times[2], *judge(default.weights, weights, gram, a)),
    ]


def cells(row: Row, reference: Row) -> list[Cell]:
    """A line of the table; ratios are to the authors' row."""
    faster = f"{statistics.median(reference.seconds) / statistics.median(row.seconds):.1f}" if row.seconds else None
    seconds = spread(row.seconds) if row.seconds else None
    ratio = row.objective / reference.objective
    return [row.shape, row.inputs, row.method, row.iterations, seconds, faster, f"{row.objective:.6g}", f"{ratio:.5f}", f"{row.gap:.3f}"]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = [part.split("x") for part in text.split(",")]
    return [(int(k), int(n)) for k, n in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default="1024x1024,4096x1024", help="K x N, comma-separated")
    parser.add_argument("--inputs", default=",".join(INPUTS), help="kinds of inputs, comma-separated (default both)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, all methods in each (default 3)")
    parser.add_argument(
        "--authors-steps",
        type=int,
        default=AUTHORS_STEPS,
        help=f"fewer steps of the authors' iteration for a quick look, seconds scaled to {AUTHORS_STEPS}",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    args = parser.parse_args()

    print(header("MagR: seconds and objective against the authors' iteration"))
    lines: list[list[Cell]] = []
    rows: list[Row] = []
    for (k, n), inputs in itertools.product(args.shapes, args.inputs.split(",")):
        found = measure(k, n, inputs, args.repeats, args.authors_steps)
        found[1].seconds[:] = [s * AUTHORS_STEPS / args.authors_steps for s in found[1].seconds]
        rows += found
        lines += [cells(row, found[1]) for row in found]
    columns = ("K x N", "inputs", "method", "iterations", "seconds", "times faster", "objective", "objective / authors'", "gap")
    print(table(columns, lines))
    print(f"\nSeconds: median (smallest to largest) of {args.repeats}, methods interleaved. Penalty a = {ALPHA:g} lambda_max(H) for all.")
    if args.authors_steps != AUTHORS_STEPS:
        print(
            f"ESTIMATE: the authors' iteration ran {args.authors_steps} steps; its seconds are scaled to {AUTHORS_STEPS}, its objective is "
            f"that of {args.authors_steps} steps."
        )
    write_json(args.json, {"alpha": ALPHA, "authors_steps": args.authors_steps, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
