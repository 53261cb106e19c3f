"""Time and memory of `magr_onnx.optimize` against onnxruntime's GPTQ on the same model, data and batches.

    python tests/benchmarks/speed.py --data DATA --work WORK [--repeats 3]

all-MiniLM-L6-v2 at 4 bits, block 32, asymmetric, calibrated on 128 sentences in batches of 16. Every run has a process of its own;
they take turns. Seconds are from file to file (loading, calibration, quantization, writing; imports come before the clock). Memory
is the process's peak resident set, what the imports alone took beside it.

onnxruntime's GPTQ is ``MatMulNBitsQuantizer(..., algo_config=GPTQWeightOnlyQuantConfig(calibration_data_reader=...))``. It takes all
batches into memory, then runs the model over all of them once for every distinct input of a MatMul. What it wrote is described below
the table, and compared with its round to nearest.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import (
    BATCH_SIZE,
    Cell,
    NpzReader,
    header,
    import_ort_tools,
    matmulnbits,
    minilm,
    ort_quantize,
    progress,
    spread,
    table,
    write_json,
)

BITS, BLOCK = 4, 32
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours: balanced (default)", {}),
    "ours-cache": ("ours: balanced, cache of 16 MB", {"cache": 16_000_000}),
    "ours-best": ("ours: best", {"effort": "best"}),
    "ours-gptq": ("ours: GPTQ alone", {"quantizer": "gptq", "alpha": 0}),
    "ours-fast": ("ours: fast", {"effort": "fast"}),
}
LABELS = {who: label for who, (label, _) in OURS.items()} | {"onnxruntime": "onnxruntime GPTQ"}


def peak_megabytes() -> float:
    """Peak resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def child(who: str, folder: Path, output: Path) -> None:
    """One run in this process; prints its figures as JSON."""
    model, calibration = folder / "model.onnx", folder / "calibration.npz"
    if who == "onnxruntime":
        import_ort_tools(torch=False)
        imported = peak_megabytes()
        begin = time.perf_counter()
        ort_quantize("gptq", model, calibration, output, BITS, BLOCK)
    else:
        import magr_onnx

        imported = peak_megabytes()
        begin = time.perf_counter()
        data = NpzReader(calibration)
        report = magr_onnx.optimize(model, data, output=output, bits=BITS, block_size=BLOCK, batch_size=BATCH_SIZE, **OURS[who][1]).report
        print(f"{LABELS[who]}: {'; '.join(report.notes) or 'no notes'}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_mb": peak_megabytes(), "imported_mb": imported}))


def run(who: str, folder: Path, output: Path) -> dict[str, float]:
    """One run in a fresh process.

    This process stays small: on Linux a child's peak starts at what its parent held when it was made.
    """
    command = [sys.executable, __file__, "--child", who, "--data", ".", "--work", str(folder), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{LABELS[who]} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(done.stderr)
    return result


def describe(folder: Path, gptq: Path, output: Path) -> str:
    """What onnxruntime's GPTQ wrote: its nodes, and how its weights differ from onnxruntime's round to nearest."""
    import numpy as np
    import onnx_ir as ir

    from magr_onnx.passes.emit.readback import read_weights

    forms = Counter((n["bits"], n["block_size"], n["zero_points"]) for n in matmulnbits(gptq))
    nodes = ", ".join(f"{c} nodes of {b} bits, block {g}, {'with' if z else 'without'} zero points" for (b, g, z), c in forms.items())
    ort_quantize("default", folder / "model.onnx", folder / "calibration.npz", output, BITS, BLOCK)
    theirs, nearest = read_weights(ir.load(gptq)), read_weights(ir.load(output))
    common = theirs.keys() & nearest.keys()
    weights = sum(theirs[name].size for name in common)
    different = sum(int((np.abs(theirs[name] - nearest[name]) > 1e-3 * np.abs(nearest[name]).max()).sum()) for name in common)
    return f"{nodes}. Of {weights:,} weights in {len(common)} layers, {different / max(weights, 1):.2%} differ from its round to nearest."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books and stsb, to export and calibrate the encoder with")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported encoder and temporary files")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--who", default=",".join(LABELS), help=f"comma-separated (default {','.join(LABELS)})")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--child", choices=LABELS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.work, args.output)
        return
    who = args.who.split(",")
    if unknown := [w for w in who if w not in LABELS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(LABELS)}")
    args.work.mkdir(parents=True, exist_ok=True)

    print(header("Time and memory of a whole run"))
    folder = minilm(args.data, args.work)
    outputs = {w: args.work / f"speed_{w}.onnx" for w in who}
    figures: dict[str, list[dict[str, float]]] = {w: [] for w in who}
    for r in range(args.repeats):
        for w in who if r % 2 == 0 else reversed(who):
            figures[w].append(run(w, folder, outputs[w]))
            progress(f"run {r + 1}, {LABELS[w]}: {figures[w][-1]['seconds']:.1f} s, peak {figures[w][-1]['peak_mb']:.0f} MB")

    reference = statistics.median(f["seconds"] for f in figures[who[-1]])
    lines: list[list[Cell]] = []
    for w in who:
        seconds, peak, imported = ([f[key] for f in figures[w]] for key in ("seconds", "peak_mb", "imported_mb"))
        ratio = f"{statistics.median(seconds) / reference:.3f}"
        lines.append([LABELS[w], spread(seconds, 1), ratio, spread(peak, 0), spread(imported, 0), f"{outputs[w].stat().st_size / 1e6:.2f}"])
    print(table(("method", "seconds", f"x {LABELS[who[-1]]}", "peak MB", "imports MB", "file MB"), lines))
    print(f"\nMedian (smallest to largest) of {args.repeats}.")
    if "onnxruntime" in who:
        print(f"\nonnxruntime's GPTQ wrote {describe(folder, outputs['onnxruntime'], args.work / 'speed_nearest.onnx')}")
    write_json(args.json, {"figures": figures})
    for path in (*outputs.values(), args.work / "speed_nearest.onnx"):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
