"""Processor time of the solvers' steps in units of one matrix product ``H W``, and the objective each reaches.

    python tests/benchmarks/kernels.py [--shapes 1024x1024,2048x2048,4096x1024] [--group 32] [--bits 4] [--rounds 3] [--trees PATH ...]

Every step is timed between two products ``H W (K, K) x (K, N)`` in float32, by the processor time of this process with one BLAS thread, and
divided by their mean; the table has the median over rounds. That ratio hardly depends on the machine or on what else runs on it.
``--trees`` measures other checkouts of this project on the same problems, each in a process of its own, to compare with; the first
columns are this one's.

Objectives are computed in float64 by the code in this file: MagR's ``F`` over that of the unchanged weights; the weighted rounding error on
the searched grids over that on min-max grids; and of all others the layer error over that of rounding to nearest. Less is better.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Cell, header, progress, table, write_json

Floats = npt.NDArray[np.floating[Any]]

TREE = Path(__file__).parents[2]
ITERATIONS, SWEEPS = 20, 4
DAMPING, ALPHA = 0.05, 1e-4


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read ``KxN,KxN``."""
    shapes = [part.split("x") for part in text.split(",")]
    return [(int(k), int(n)) for k, n in shapes]


def module(*names: str) -> Any:
    """Import the first of these modules of the package that there is: trees differ in where they have their files."""
    for name in names:
        for prefix in ("magr_onnx.core.", "magr_onnx."):
            try:
                return importlib.import_module(prefix + name)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("magr_onnx"):
                    raise
    raise ModuleNotFoundError(f"none of {', '.join(names)} in magr_onnx")


def inputs(k: int, seed: int) -> Floats:
    """Rows ``(2 k, k)`` float32: correlated, of log-normal magnitude, one input in a hundred an outlier."""
    rng = np.random.default_rng(seed)
    x = 0.5 * rng.standard_normal((2 * k, 64)) @ rng.standard_normal((64, k)) + rng.standard_normal((2 * k, k))
    x *= np.exp(0.3 * rng.standard_normal(k)) * np.where(rng.random(k) < 0.01, 5, 1)
    return x.astype(np.float32)


def relative(weight: Floats, target: Floats, gram: Floats, unit: float = 1.0) -> float:
    """The layer error of ``weight (K, N)`` over ``unit``."""
    difference = weight.astype(np.float64) - target
    return float(np.einsum("kn,kn->", difference, gram @ difference)) / unit


class Measured:
    """The steps of one problem, each timed beside products."""

    def __init__(self, k: int, n: int, rounds: int) -> None:
        self.rounds = rounds
        rng = np.random.default_rng(1)
        self.left, self.right = rng.standard_normal((k, k), np.float32), rng.standard_normal((k, n), np.float32)
        self.seconds_of_products: list[float] = []
        self.rows: dict[str, tuple[float, float | None]] = {}

    def product(self) -> float:
        begin = time.process_time()
        np.matmul(self.left, self.right)
        self.seconds_of_products.append(time.process_time() - begin)
        return self.seconds_of_products[-1]

    def step(self, name: str, run: Callable[[], Any], parts: Callable[[Any], int], objective: Callable[[Any], float] | None) -> Any:
        """Time ``run()``, which is so many ``parts`` of its result."""
        progress(f"  {name}")
        self.product()
        ratios = []
        for _ in range(self.rounds):
            before = self.product()
            begin = time.process_time()
            result = run()
            seconds = time.process_time() - begin
            ratios.append(seconds / parts(result) / ((before + self.product()) / 2))
        self.rows[name] = statistics.median(ratios), None if objective is None else objective(result)
        return result


def measure(k: int, n: int, spec_options: dict[str, Any], rounds: int, whole: bool) -> Measured:
    """All steps of a layer ``(k, n)``, by the package on the path."""
    types, grids, magr, linalg = (module(name) for name in ("types", "grid", "magr", "linalg"))
    gptq, comq = module("quantizers.gptq"), module("quantizers.comq")
    regrid = module("quantizers.grid_refinement", "quantizers.regrid").regrid
    spec = types.WeightSpec(**spec_options)
    x = inputs(k, 0)
    weights = (0.02 * np.random.default_rng(2).standard_t(4, (k, n))).astype(np.float32)
    stats = types.LayerStats((x.T @ x / len(x)).astype(np.float64), x.mean(axis=0).astype(np.float64), len(x))
    gram, diagonal = linalg.damped(stats.gram, DAMPING), stats.gram.diagonal()
    single = gram.astype(np.float32)
    nearest = grids.minmax(weights, spec)
    unit = relative(nearest.weight(nearest.codes(weights)).dequantize(), weights, gram)
    rounding = relative(nearest.weight(nearest.codes(weights)).dequantize(), weights, np.diag(diagonal))

    def error(weight: Any) -> float:
        return relative(getattr(weight, "weight", weight).dequantize(), weights, gram, unit)

    def reduced() -> Any:
        return magr.reduce(weights, gram, alpha=ALPHA, group_size=spec.group_size, max_iterations=ITERATIONS, tolerance=0.0)

    m = Measured(k, n, rounds)
    m.step("MagR, an iteration", reduced, lambda r: max(r.iterations, 1), lambda r: float(r.objective / r.start))
    grid = m.step(
        "choice of grids",
        lambda: grids.choose(weights, spec, diagonal, None),
        lambda _: 1,
        lambda g: relative(g.weight(g.codes(weights)).dequantize(), weights, np.diag(diagonal), rounding),
    )
    feedback = m.step("GPTQ, factor", lambda: gptq.prepare(gram, 0.0), lambda _: 1, None)
    start = m.step("GPTQ, solve", lambda: gptq.solve(weights, feedback, grid), lambda _: 1, error)
    for name, rescale in (("a sweep", False), ("a sweep with refits", True)):
        run = lambda rescale=rescale: comq.refine(weights, start, single, sweeps=SWEEPS, rescale=rescale, tolerance=0.0)  # noqa: E731
        refined = m.step(name, run, lambda r: len(r.errors) - 1, error)
    m.step("regrid", lambda: regrid(weights, refined.weight, single), lambda _: 1, error)
    if whole:
        m.step("whole layer", solver(x, weights, spec), lambda _: 1, lambda s: s.errors[-1] / unit)
    return m


def solver(x: Floats, weights: Floats, spec: Any) -> Callable[[], Any]:
    """Solve a layer by the default method of effort ``balanced``, a quarter of the rows held out, with nothing remembered."""
    types, interface, auto = module("types"), module("quantizers.interface", "quantizers.problem"), module("quantizers.auto")

    def moments(rows: Floats) -> tuple[Floats, Floats, int]:
        return (rows.T @ rows / len(rows)).astype(np.float64), rows.mean(axis=0).astype(np.float64), len(rows)

    whole, part = moments(x), moments(x[: len(x) // 4])

    def run() -> Any:
        held_out = types.LayerStats(*part)
        folds = {"folds": (held_out,)} if "folds" in types.LayerStats.__dataclass_fields__ else {"held_out": held_out}
        problem = interface.Problem(weights, weights, types.LayerStats(*whole, **folds), False, spec)
        return auto.run(problem, interface.Options())

    return run


def child(args: argparse.Namespace) -> None:
    """Measure the package on the path; print figures as JSON."""
    (k, n), rounds = args.shapes[0], args.rounds
    m = measure(k, n, {"bits": args.bits, "group_size": args.group or None}, rounds, args.whole)
    rate = 2 * k * k * n / statistics.median(m.seconds_of_products) / 1e9
    print(json.dumps({"rate": rate, "rows": m.rows}))


def run(tree: Path, shape: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a tree, from a process of its own with one BLAS thread."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    options = ["--group", str(args.group), "--bits", str(args.bits), "--rounds", str(args.rounds), *(["--whole"] if args.whole else [])]
    command = [sys.executable, __file__, "--child", "--shapes", f"{shape[0]}x{shape[1]}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables | {"PYTHONPATH": str(tree)})
    if done.returncode:
        raise SystemExit(f"{tree}: the measurement failed")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default="1024x1024,2048x2048,4096x1024", help="K x N, comma-separated")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32, help="rows that share a scale; 0 for the whole column (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--whole", action="store_true", help="the whole solve of a layer too")
    parser.add_argument("--trees", type=Path, nargs="*", default=[], help="other checkouts to compare with")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(header("Steps of the solvers, in products H W"))
    results = []
    for k, n in args.shapes:
        trees = [TREE, *args.trees]
        figures = []
        for tree in trees:
            progress(f"{k} x {n}, {tree}")
            figures.append(run(tree, (k, n), args))
        rates = ", ".join(f"{f['rate']:.0f}" for f in figures)
        print(f"\nK = {k}, N = {n}, {args.bits} bits, group {args.group or 'K'}; products at {rates} GFLOP/s\n")
        lines: list[list[Cell]] = []
        for name in figures[0]["rows"]:
            cells = [f["rows"][name] for f in figures]
            pairs: list[Cell] = []
            for products, objective in cells:
                pairs += [f"{products:.2f}", None if objective is None else f"{objective:.5f}"]
            lines.append([name, *pairs])
        columns = [c for tree in trees for c in (f"{tree.name}: products", "objective")]
        print(table(["step", *columns], lines), flush=True)
        results.append({"k": k, "n": n, "figures": figures})
    write_json(args.json, {"bits": args.bits, "group": args.group, "results": results})


if __name__ == "__main__":
    main()
