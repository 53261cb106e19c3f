"""The table of docs/benchmarks.md on MagR layer by layer: errors on held-out rows, by strength, grid and quantizer.

    python tests/benchmarks/magr_layers.py --data DATA --work WORK --model gemma [--layers 9,65] [--bits 3,2] [--samples 48]

Of some MatMuls with a weight, by default every eleventh, 64 output channels, one scale each. Two thirds of the calibration samples make
the Gram matrix; the others judge. Relative squared errors of outputs in dB, the mean over layers; less is better. ``DATA``, ``WORK`` and
models as in accuracy.py. *Relative* strengths are this package's; *authors'* is their iteration with their absolute 1e-3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from common import Cell, header, progress, table
from magr import BETA, FOUND, samples
from onnx.external_data_helper import load_external_data_for_tensor

from magr_onnx.core import magr
from magr_onnx.core.grid import Grid, minmax, search
from magr_onnx.core.linalg import automatic_damping, damped, layer_error
from magr_onnx.core.quantizers import comq, gptq
from magr_onnx.core.quantizers.grid_refinement import regrid
from magr_onnx.core.types import WeightSpec
from magr_onnx.runtime.ort.session import Session

Floats = npt.NDArray[Any]

ALPHAS = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CHANNELS = 64
EVERY = 11


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight ``(K, n)`` and second moments of its input ``(K, K)``, of the rows to solve from and of those to judge by."""

    name: str
    weight: Floats
    gram: Floats
    held_out: Floats
    rows: int

    def error(self, weight: Floats) -> float:
        """Relative squared error of the outputs, dB."""
        w = self.weight.astype(np.float64)
        return float(10 * np.log10(layer_error(weight - w, self.held_out) / layer_error(w, self.held_out)))

    def peaks(self) -> str:
        """How uneven the inputs and the weights are."""
        power, largest = np.diag(self.gram), (np.abs(self.weight).max(axis=0) / self.weight.std(axis=0)).mean()
        return (
            f"power of inputs: mean {power.mean() / np.median(power):.1f} times the median, most {power.max() / power.mean():.0f} times "
            f"the mean; a channel's largest weight: {largest:.1f} standard deviations"
        )


def layers(model: Path, feeds: dict[str, Floats], numbers: list[int], every: int = EVERY, channels: int = CHANNELS) -> Iterator[Layer]:
    """Some layers of a model, by number or every so many, with the moments of their inputs, sample by sample."""
    graph = onnx.load(str(model), load_external_data=False)
    weights = {i.name: i for i in graph.graph.initializer}
    nodes = [n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    nodes = [nodes[i] for i in numbers] or nodes[::every]
    taps = list(dict.fromkeys(n.input[0] for n in nodes))
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in taps)
    tapped = model.parent / "magr_tapped.onnx"  # beside the weights
    count = len(next(iter(feeds.values())))
    fit = 2 * count // 3
    sums: dict[tuple[str, bool], list[Any]] = {(name, part): [0.0, 0] for name in taps for part in (True, False)}
    try:
        onnx.save(graph, str(tapped))
        with Session(tapped) as session:
            for i in range(count):
                for name, value in zip(taps, session.run({n: a[i : i + 1] for n, a in feeds.items()}, taps), strict=True):
                    x = value.reshape(-1, value.shape[-1]).astype(np.float64)
                    total = sums[name, i < fit]
                    total[0] += x.T @ x
                    total[1] += len(x)
    finally:
        tapped.unlink(missing_ok=True)
    for node in nodes:
        tensor = weights[node.input[1]]
        if tensor.external_data:
            load_external_data_for_tensor(tensor, str(model.parent))
        weight = onnx.numpy_helper.to_array(tensor)
        columns = np.linspace(0, weight.shape[1] - 1, min(channels, weight.shape[1])).astype(int)
        (inside, rows), (outside, others) = (sums[node.input[0], part] for part in (True, False))
        yield Layer(node.name, np.ascontiguousarray(weight[:, columns]), inside / rows, outside / others, rows)


def errors(layer: Layer, bits: int) -> dict[tuple[str, str], float]:
    """Errors by grid and quantizer, and strength."""
    spec = WeightSpec(bits, None)
    damping = automatic_damping(len(layer.weight), layer.rows)
    gram = damped(layer.gram, damping).astype(np.float32)
    factor = gptq.prepare(layer.gram, damping, act_order=True)
    textbook = gptq.prepare(layer.gram, 0.01, act_order=False)

    def balanced(weights: Floats, grid: Grid) -> Floats:
        start = comq.refine(layer.weight, gptq.solve(weights, factor, grid), gram, sweeps=4, rescale=True).weight
        refitted, _ = regrid(layer.weight, start, gram)
        return comq.refine(layer.weight, refitted, gram, sweeps=4, rescale=True).weight.dequantize()

    quantizers: dict[str, Callable[[Floats, Grid], Floats]] = {
        "rounding": lambda weights, grid: grid.weight(grid.codes(weights)).dequantize(),
        "GPTQ, damping 0.01, in order": lambda weights, grid: gptq.solve(weights, textbook, grid).dequantize(),
        "GPTQ": lambda weights, grid: gptq.solve(weights, factor, grid).dequantize(),
        "and sweeps, refits": balanced,
    }
    reduced = {f"{alpha:g}": magr.reduce(layer.weight, gram, alpha=alpha).weights for alpha in ALPHAS}
    reduced["authors'"] = magr.reduce(layer.weight, layer.gram, alpha=1e-3, relative=False, method="authors").weights
    found = {}
    for strength, weights in reduced.items():
        grids = {
            "min-max": minmax(weights, spec),
            f"min-max, beta {BETA[bits]:g}": minmax(weights, spec, BETA[bits]),
            "searched": search(weights, spec, np.diag(layer.gram)),
        }
        for grid in grids:
            for quantizer, run in quantizers.items():
                found[f"{grid}: {quantizer}", strength] = layer.error(run(weights, grids[grid]))
        found["MagR alone", strength] = layer.error(weights) if strength != "0" else -np.inf
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the models' data")
    parser.add_argument("--work", type=Path, required=True, help="folder for exported encoders")
    parser.add_argument("--model", default="gemma", help=f"one of {','.join(FOUND)}")
    parser.add_argument("--layers", default="", help="numbers of MatMuls with a weight, from 0, comma-separated")
    parser.add_argument("--bits", default="3,2", help="comma-separated")
    parser.add_argument("--samples", type=int, default=48, help="calibration samples, of which a third judges")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(header(f"MagR by layer, {args.model}"))
    benchmark = FOUND[args.model](args.data, args.work)
    every: list[int] = [int(bits) for bits in args.bits.split(",")]
    numbers: list[int] = [int(number) for number in args.layers.split(",") if number]
    found: dict[int, list[dict[tuple[str, str], float]]] = {bits: [] for bits in every}
    for layer in layers(benchmark.model, samples(benchmark.calibration, args.samples), numbers):
        progress(f"{layer.name}: {layer.peaks()}")
        for bits in every:
            found[bits].append(errors(layer, bits))
    for bits, of_layers in found.items():
        names, strengths = (list(dict.fromkeys(key[i] for key in of_layers[0])) for i in (0, 1))
        rows: list[list[Cell]] = [[name, *(f"{np.mean([e[name, s] for e in of_layers]):.2f}" for s in strengths)] for name in names]
        print(f"## {bits} bits, {len(of_layers)} layers\n\n{table(('grid: quantizer', *strengths), rows)}\n", flush=True)


if __name__ == "__main__":
    main()
