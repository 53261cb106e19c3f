"""What a second worker gains, and whether files stay the same where workers are killed.

    python tests/benchmarks/workers.py [--width 2048] [--rounds 3] [--kills 20] [--workers 1 2]

The first table has the time that layers of K = N = ``--width`` take to be quantized at the default effort by one worker and by two, each a
process of one thread, begun anew for every run: of layers side by side in one stage, and of stages of three layers and of one, as in a
transformer. *Solving* begins where calibration ends, and has the transfers in it; the *busiest worker* is the processor time of the worker
that had the most, which other work on the machine hardly changes; the *whole run* also has the start of the workers, calibration and the
comparison of both models. Both numbers of workers are measured in turns; ratios are of the same round, and all figures medians. Run it on a
machine that is otherwise idle.

The second part quantizes the bundled model by two workers, one of which is killed (SIGKILL) at a random moment, until ``--kills`` were,
and counts the files that are the same as that of a run without workers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import psutil
from common import Cell, header, progress, spread, table
from kernels import inputs

import magr_onnx
from magr_onnx.models import bundled

SHAPES = {"8 in one stage": [8], "3 and 1, twice": [3, 1, 3, 1]}


def write(path: Path, stages: Sequence[int], width: int) -> None:
    """Write a model of stages of so many layers side by side, whose sum is the input of the next stage."""
    rng, nodes, weights, source = np.random.default_rng(1), list[onnx.NodeProto](), list[onnx.TensorProto](), "x"
    for s, count in enumerate(stages):
        for i in range(count):
            weight = (0.02 * rng.standard_t(4, (width, width))).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(weight, f"w{s}.{i}"))
            nodes.append(oh.make_node("MatMul", [source, f"w{s}.{i}"], [f"y{s}.{i}"], f"layer{s}.{i}"))
        nodes.append(oh.make_node("Sum", [f"y{s}.{i}" for i in range(count)], [f"sum{s}"]))
        nodes.append(oh.make_node("Tanh", [f"sum{s}"], [f"x{s}"]))
        source = f"x{s}"
    ends = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width]) for name in ("x", source)]
    graph = oh.make_graph(nodes, "stages", ends[:1], ends[1:], weights)
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), path)


def seconds(model: Path, width: int, workers: int) -> tuple[float, float, float]:
    """Quantize a model; return the time of the solving, the processor time of the busiest worker in it, and the time of the whole run."""
    rows, spent = inputs(width, 0), dict[int, list[float]]()

    def step(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done in (0, total):
            for worker in worker_processes():
                times = psutil.Process(worker).cpu_times()
                spent.setdefault(worker, []).append(times.user + times.system)

    begin = time.perf_counter()
    data = [{"x": rows[at : at + 256]} for at in range(0, len(rows), 256)]
    options = {"output": model.with_suffix(f".{workers}.onnx"), "workers": workers, "progress": step, "accuracy_level": 0}
    _, report = magr_onnx.optimize(model, data, **options)  # type: ignore[arg-type]
    return report.seconds["quantize"], max(times[-1] - times[0] for times in spent.values()), time.perf_counter() - begin


def speed(counts: tuple[int, int], width: int, rounds: int, folder: Path) -> str:
    """Measure both numbers of workers in turns; return the table."""
    lines: list[list[Cell]] = []
    for name, stages in SHAPES.items():
        write(model := folder / "model.onnx", stages, width)
        times: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
        for turn in range(rounds):
            for count in counts if turn % 2 == 0 else counts[::-1]:
                times[count].append(seconds(model, width, count))
                figures = ", ".join(f"{value:.1f}" for value in times[count][-1])
                progress(f"{name}, {count} workers, {turn + 1} of {rounds}: {figures} s")
        same = len({model.with_suffix(f".{count}.onnx").read_bytes() for count in counts}) == 1
        for part, what in enumerate(("solving", "busiest worker", "whole run")):
            few, many = ([measured[part] for measured in times[count]] for count in counts)
            ratios = [a / b for a, b in zip(few, many, strict=True)]
            medians = [f"{statistics.median(measured):.1f}" for measured in (few, many)]
            lines.append([name, what, *medians, spread(ratios), "yes" if same else "no"])
    return table(["layers", "time", *(f"by {count}, s" for count in counts), "times as fast", "same file"], lines)


def worker_processes() -> set[int]:
    """Return the processes of workers below this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if any("spawn_main" in argument for argument in process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def killing(path: Path, effort: str, after: float, which: random.Random) -> int:
    """Quantize the bundled model by two workers, one of which is killed so long after the first layer is begun; return how many were."""
    begun, killed = threading.Event(), list[int]()

    def kill() -> None:
        begun.wait()
        time.sleep(after)
        if workers := sorted(worker_processes()):
            killed.append(which.choice(workers))
            os.kill(killed[-1], signal.SIGKILL)

    def step(stage: str, done: int, total: int) -> None:
        if stage == "quantizing":
            begun.set()

    thread = threading.Thread(target=kill)
    thread.start()
    quantize(path, effort, 2, step)
    thread.join()
    return len(killed)


def quantize(path: Path, effort: str, workers: int | None, step: object = False) -> float:
    """Quantize the bundled model; return the time of the solving."""
    data = {"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:20]}
    options = {"effort": effort, "accuracy_level": 0, "workers": workers, "progress": step}
    return magr_onnx.optimize(bundled.MODEL, data, output=path, **options).report.seconds["quantize"]  # type: ignore[arg-type]


def kills(count: int, folder: Path) -> str:
    """Count the files that are the same although a worker was killed."""
    which, same, killed = random.Random(0), 0, 0
    expected, length = {}, {}
    for effort in ("fast", "balanced"):
        quantize(path := folder / f"{effort}.onnx", effort, None)
        expected[effort] = hashlib.sha256(path.read_bytes()).digest()
        length[effort] = quantize(path, effort, 2)
    runs = 0
    while killed < count:
        effort = ("fast", "balanced")[runs % 2]
        runs += 1
        progress(f"killed {killed} of {count}")
        killed += killing(path := folder / "killed.onnx", effort, which.uniform(0, 0.9 * length[effort]), which)
        same += hashlib.sha256(path.read_bytes()).digest() == expected[effort]
    return f"{runs} runs by two workers, {killed} of which had one killed: {same} files the same as by none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs of a layer (default 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; 0 for none (default 3)")
    parser.add_argument("--kills", type=int, default=20, help="runs with a worker killed (default 20)")
    parser.add_argument("--workers", type=int, nargs=2, default=[1, 2], help="numbers of workers to compare (default 1 2)")
    args = parser.parse_args()
    print(header("Layers solved by workers"))
    with tempfile.TemporaryDirectory() as folder:
        if args.rounds:
            print(speed(tuple(args.workers), args.width, args.rounds, Path(folder)), flush=True)
        if args.kills:
            print(f"\n{kills(args.kills, Path(folder))}")


if __name__ == "__main__":
    main()
