"""The table of docs/methods/rotations.md: rotations of the residual stream, beside equalization, on language models.

    python tests/benchmarks/rotations.py --data DATA --work WORK [--models tiny,lm] [--settings TEXT] [--samples 32] [--blocks 48]

Mean KL divergence of next-token distributions from the float model's, and the cross-entropy above it, on held-out blocks, of the written
file. ``DATA`` and ``WORK`` as in accuracy.py. Calibrated on the first samples of the calibration data; with 32 samples and 48 blocks, one
result takes 5 s (tiny) and 30 s (lm) of one core.
"""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import MODELS, Benchmark, divergences, language_model
from common import Cell, header, progress, table

import magr_onnx

CHANNEL: dict[str, Any] = {"bits": 3, "block_size": None}
ROUNDING: dict[str, Any] = {"quantizer": "rtn", "alpha": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "3-bit per channel, rounding": {**CHANNEL, **ROUNDING},
    "3-bit per channel, GPTQ without MagR": {**CHANNEL, "quantizer": "gptq", "alpha": 0},
    "3-bit per channel, fast": {**CHANNEL, "effort": "fast"},
    "3-bit per channel, balanced": {**CHANNEL, "effort": "balanced"},
    "dynamic-int8, 4-bit weights, rounding": {"format": "dynamic-int8", "bits": 4, **ROUNDING},
    "dynamic-int8, 4-bit weights, fast": {"format": "dynamic-int8", "bits": 4, "effort": "fast"},
    "dynamic-int8, 4-bit weights, balanced": {"format": "dynamic-int8", "bits": 4, "effort": "balanced"},
    "qdq-int8, 4-bit weights, balanced": {"format": "qdq-int8", "bits": 4, "effort": "balanced"},
    "4-bit block 32, balanced": {"bits": 4, "effort": "balanced"},
    "3-bit block 32, balanced": {"bits": 3, "effort": "balanced"},
    "2-bit block 32, balanced": {"bits": 2, "effort": "balanced"},
}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"rotate": "none"},
    "`--equalize`": {"equalize": True, "rotate": "none"},
    "Hadamard": {"hadamard": True},
    "`--rotate on`": {"rotate": "on"},
    "`--rotate auto`": {"rotate": "auto"},
    "both": {"rotate": "on", "equalize": True},
}


def cell(benchmark: Benchmark, work: Path, calibration: dict[str, Any], options: dict[str, Any]) -> str:
    """Divergence and cross-entropy above the float model's of the model with some options."""
    output = work / f"{benchmark.model.parent.name}_rotated.onnx"
    hadamard = {k: v for k, v in options.items() if k != "hadamard"}
    if hadamard != options:  # without the descent, which only pipeline text can leave out
        plan = magr_onnx.build_pipeline(**{**hadamard, "rotate": "on"})
        hadamard = {"pipeline_text": replace(plan, rewrites=(replace(plan.rewrites[0], steps=0),))}  # type: ignore[call-arg]
    magr_onnx.optimize(benchmark.model, calibration, output=output, progress=False, **hadamard)
    reference = benchmark.outputs(benchmark.model)
    over = benchmark.metrics(benchmark.outputs(output), reference)[1]
    text = f"{divergences(benchmark, output).mean():.4f} ({over:+.4f})"
    output.unlink()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the models' data")
    parser.add_argument("--work", type=Path, required=True, help="folder for temporary files")
    parser.add_argument("--models", default="tiny,lm", help="comma-separated")
    parser.add_argument("--settings", default="*", help="shell patterns of settings, separated by semicolons")
    parser.add_argument("--methods", default="*", help="shell patterns of methods, separated by semicolons")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--blocks", type=int, default=48, help="held-out blocks")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(header("Rotations of the residual stream"))
    chosen = [name for name in SETTINGS if any(fnmatch.fnmatch(name, pattern) for pattern in args.settings.split(";"))]
    methods = {name: more for name, more in METHODS.items() if any(fnmatch.fnmatch(name, pattern) for pattern in args.methods.split(";"))}
    for model in args.models.split(","):
        benchmark = MODELS[model](args.data, args.work)
        blocks = benchmark.test["input_ids"][: args.blocks]
        benchmark = language_model(benchmark.title.partition(",")[0], benchmark.model, benchmark.calibration, blocks, 8)
        with np.load(benchmark.calibration) as file:
            calibration = {name: file[name][: args.samples] for name in file.files}
        rows: list[list[Cell]] = []
        for name in chosen:
            found = {}
            for method, more in methods.items():
                found[method] = cell(benchmark, args.work, calibration, {**SETTINGS[name], **more})
                progress(f"{model}, {name}, {method}: {found[method]}")
            rows.append([name, *found.values()])
        print(f"## {benchmark.title}\n\n" + table(("setting", *methods), rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
