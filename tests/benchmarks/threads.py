"""Wall-clock time of the whole solve of a layer on one core, on all cores, and beside other busy processes.

    python tests/benchmarks/threads.py [--shapes 1024x1024,2048x2048] [--busy 2] [--rounds 3] [--trees PATH ...]

Each solve is that of effort ``balanced``, in a process of its own. Times are medians over rounds, taken in turns; *busy* are processes that
count, as many as ``--busy``. ``--trees`` measures other checkouts of this project as well. Run it on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import Cell, header, progress, table
from kernels import TREE, inputs, module, parse_shapes, solver

COUNT = "while True: pass"


def child(k: int, n: int) -> None:
    """Print the seconds of the second of two solves, and the objective."""
    weights = np.random.default_rng(1).standard_normal((k, n), np.float32)
    run = solver(inputs(k, 0), weights, module("types").WeightSpec(4, 32))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ModuleNotFoundError):
            stack.enter_context(module("threads").single_threaded_blas())
        run()
        begin = time.perf_counter()
        solution = run()
        print(time.perf_counter() - begin, solution.errors[-1])


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes at work beside what is measured."""
    processes = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(tree: Path, shape: tuple[int, int], threads: int | None) -> float:
    """Time a solve by a tree, with so many threads; None for as many as it takes by itself."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    variables = {key: value for key, value in os.environ.items() if key not in names} | {"PYTHONPATH": str(tree)}
    variables |= {} if threads is None else dict.fromkeys(names, str(threads))
    command = [sys.executable, __file__, "--child", "--shapes", f"{shape[0]}x{shape[1]}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        raise SystemExit(f"{tree}: the measurement failed")
    return float(done.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default="1024x1024,2048x2048", help="K x N, comma-separated")
    parser.add_argument("--busy", type=int, default=2, help="other processes (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--trees", type=Path, nargs="*", default=[], help="other checkouts to compare with")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.shapes[0])
        return
    print(header("Solve of a layer, cores and other processes"))
    lines: list[list[Cell]] = []
    for shape in args.shapes:
        for tree in [TREE, *args.trees]:
            times: list[list[float]] = [[], [], []]
            for turn in range(args.rounds):
                progress(f"{shape[0]} x {shape[1]}, {tree}, {turn + 1} of {args.rounds}")
                for measured, threads, others in zip(times, (1, None, None), (0, 0, args.busy), strict=True):
                    with busy(others):
                        measured.append(seconds(tree, shape, threads))
            one, free, beside = map(statistics.median, times)
            cells: list[Cell] = [f"{one:.2f}", f"{free:.2f}", f"{one / free:.2f}", f"{beside:.2f}", f"{beside / free:.2f}"]
            lines.append([f"{shape[0]} x {shape[1]}", tree.name, *cells])
    print(table(["layer", "tree", "one core, s", "all, s", "times as fast", f"beside {args.busy} busy, s", "times as long"], lines))


if __name__ == "__main__":
    main()
