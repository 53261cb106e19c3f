"""The tables of docs/benchmarks.md on learned rounding (LRQ, FlexRound): layers and whole models, against the other quantizers.

    python tests/benchmarks/lrq.py --data DATA --work WORK [--models tiny,lm,char] [--settings 4x32,3x32,2x32,4xchannel,3xchannel]

Layers: of some MatMuls with a weight (every eleventh by default, ``--every``) 256 output channels, without MagR. Two thirds of the
calibration samples make the Gram matrix; the others judge. Relative squared errors of outputs in dB, the mean over layers; less is
better. Seconds are those of the quantizer alone, one thread, all layers together. Models: KL divergence from the float model in held-out
blocks, and seconds from file to file (``auto`` with error feedback, as it is by default; the others without). ``DATA``, ``WORK`` and
models as in accuracy.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SETTINGS, Benchmark, Setting, divergences
from common import Cell, header, progress, table
from magr import FOUND, samples
from magr_layers import Layer, layers

import magr_onnx
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem
from magr_onnx.core.types import LayerStats, WeightSpec

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "lrq": {},
    "lrq, full rank": {"lrq_rank": 0},
    "gptq": {},
    "lrq, from gptq": {"lrq_start": "gptq"},
    "comq": {},
    "lrq, from comq": {"lrq_start": "comq"},
    "auto": {},
}
CHANNELS = 256


def of_layers(found: list[Layer], setting: Setting) -> dict[str, tuple[float, float]]:
    """Mean error in dB and seconds by method."""
    result = {}
    for name, told in METHODS.items():
        decibels, begin = [], time.perf_counter()
        for layer in found:
            stats = LayerStats(layer.gram, np.zeros(len(layer.gram)), layer.rows)
            problem = Problem(layer.weight, layer.weight, stats, False, WeightSpec(setting.bits, setting.block))
            decibels.append(layer.error(QUANTIZERS[name.partition(",")[0]].run(problem, Options(method_options=told)).weight.dequantize()))
        result[name] = float(np.mean(decibels)), time.perf_counter() - begin
        progress(f"{setting.label}, {name}: {result[name][0]:.2f} dB, {result[name][1]:.1f} s")
    return result


def of_model(benchmark: Benchmark, work: Path, setting: Setting, count: int) -> dict[str, tuple[float, float]]:
    """KL divergence and seconds by method."""
    result, output = {}, work / "lrq_quantized.onnx"
    calibration = samples(benchmark.calibration, count)
    for name, told in METHODS.items():
        options = {"quantizer": name.partition(",")[0], **told, "alpha": 0} if name != "auto" else {}
        begin = time.perf_counter()
        magr_onnx.optimize(
            benchmark.model, calibration, output=output, bits=setting.bits, block_size=setting.block, progress=False, **options
        )
        seconds = time.perf_counter() - begin
        result[name] = float(divergences(benchmark, output).mean()), seconds
        progress(f"{setting.label}, {name}: KL {result[name][0]:.4f}, {seconds:.0f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the models' data")
    parser.add_argument("--work", type=Path, required=True, help="folder for temporary files")
    parser.add_argument("--models", default="tiny", help=f"language models, comma-separated, of {','.join(FOUND)}")
    parser.add_argument("--settings", default="4x32,3x32,2x32,4xchannel,3xchannel,2xchannel", help=f"of {','.join(SETTINGS)}")
    parser.add_argument("--every", type=int, default=11, help="so many MatMuls with a weight for one that is measured")
    parser.add_argument("--samples", type=int, default=96, help="calibration samples")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--only", choices=["layers", "models"], help="one kind of tables")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(header("Learned rounding"))
    settings = {name: SETTINGS[name] for name in args.settings.split(",")}
    for model in args.models.split(","):
        benchmark = FOUND[model](args.data, args.work)
        benchmark = replace(benchmark, test={"input_ids": benchmark.test["input_ids"][: args.blocks]})
        tables: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
        if args.only != "models":
            some = list(layers(benchmark.model, samples(benchmark.calibration, args.samples), [], every=args.every, channels=CHANNELS))
            tables[f"{len(some)} layers, dB (s)"] = {name: of_layers(some, setting) for name, setting in settings.items()}
        if args.only != "layers":
            tables["the whole model, KL divergence (s)"] = {n: of_model(benchmark, args.work, s, args.samples) for n, s in settings.items()}
        for title, of_settings in tables.items():
            form = "{:.2f} ({:.1f})" if "dB" in title else "{:.4f} ({:.1f})"
            rows: list[list[Cell]] = [[method, *(form.format(*found[method]) for found in of_settings.values())] for method in METHODS]
            print(f"## {model}: {title}\n\n{table(('quantizer', *(s.label for s in settings.values())), rows)}\n", flush=True)


if __name__ == "__main__":
    main()
