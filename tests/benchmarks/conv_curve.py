"""Convolutional networks over the width of the accumulator: SQNR of our files, of fewer weight bits, and of A2Q's and A2Q+'s projections.

    python tests/benchmarks/conv_curve.py WORK [--networks resnet mobile] [--json RESULTS] [--plot CURVES.svg]

Networks are folders of WORK, as of ``convolutions.py``. Everything is quantized by `magr_onnx.optimize` to qdq-int8: all convolutions and
linear layers multiply uint8 by weights of 8 or 4 bits. Ranges and statistics of a network are calibrated once for all its files. Every file
is proved not to overflow an accumulator of P bits for whole dot products, and judged on held-out inputs by onnxruntime. A file that fits
the next narrower accumulator as it is stands for that one too; but not those of A2Q and A2Q+, whose own bounds are coarser.

A2Q and A2Q+ are their projections, rounded to zero, without the training that their authors combine them with; with symmetric weights, as
onnxruntime's integer convolutions have, A2Q+ does not centre columns. ``fewer weight bits`` has the most bits, the same in all layers,
whose sums fit by their type alone; convolutions have 3 or more.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import svg
from common import Cell, header, progress, quiet, table, write_json
from convolutions import Network, Row, judge, load
from curve import most_bits

import magr_onnx
from magr_onnx.config.options import Options
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.passes.integer.dot_products import find
from magr_onnx.runtime.calibration import conv_patches, tensor_ranges
from magr_onnx.workflow import optimize, rounded_activations

WIDTHS = range(32, 11, -1)
BITS = (8, 4)
REDUCED = "fewer weight bits"
METHODS: dict[str, Options] = {"ours": {}, REDUCED: {}, "A2Q": {"quantizer": "a2q"}, "A2Q+": {"quantizer": "a2q+"}}
FEWEST = 3  # bits of a convolution


@contextlib.contextmanager
def calibrated_once() -> Iterator[None]:
    """Remember what depends on a network and its data alone, and leave out the check of every file at the end."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembering(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            name = (function.__name__, key(*args))
            if name not in known:
                known[name] = function(*args, **options)
            return known[name]

        return call

    replaced = (
        (conv_patches, "collect", lambda model, layers, data: tuple(layer.name for layer in layers)),
        (tensor_ranges, "histograms_of", lambda *_: ()),
        (rounded_activations._Choice, "ranges", lambda choice: ()),
    )
    with contextlib.ExitStack() as stack:
        for module, name, key in replaced:
            stack.enter_context(mock.patch.object(module, name, remembering(getattr(module, name), key)))
        stack.enter_context(mock.patch.object(optimize, "_check", return_value=(None, ())))
        yield


def quantize(network: Network, output: Path, options: Options) -> None:
    with quiet():
        magr_onnx.optimize(
            network.model, network.calibration, output=output, batch_size=network.batch, format="qdq-int8", progress=False, **options
        )


def measure(network: Network, work: Path) -> Iterator[dict[str, Any]]:
    """A row for every weight width, accumulator and method."""
    import onnx_ir as ir

    free = work / "free.onnx"
    quantize(network, free, {})
    longest = max(dot.k for dot in find(ir.load(free)) if isinstance(dot, IntegerDot))
    for bits in BITS:
        for number, (method, own) in enumerate(METHODS.items()):
            output, last = work / f"{bits}-{number}.onnx", None
            for width in WIDTHS:
                fewer = most_bits(width, longest, bits) if method == REDUCED else bits
                row: dict[str, Any] = {"bits": bits, "width": width, "method": method, "written": fewer, "decibels": None}
                if last and last["written"] == fewer and not method.startswith("A2Q") and holds(output, width):
                    row |= {name: last[name] for name in ("decibels", "agreement")}
                elif fewer is not None and fewer >= FEWEST:
                    options: Options = {"bits": fewer, "conv_bits": fewer, **own}  # type: ignore[typeddict-item]
                    if method != REDUCED:
                        options |= {"accumulator_bits": width}
                    quantize(network, output, options)
                    if not holds(output, width):
                        raise AssertionError(f"{method} overflows {width} bits")
                    judged = Row(network.name, method)
                    judge(judged, network, output)
                    row |= {"decibels": judged.decibels, "agreement": judged.agreement}
                    last = row
                progress(f"{network.name}, W{bits}A8, P={width}, {method}: {row['decibels']}")
                yield row


def holds(path: Path, width: int) -> bool:
    return magr_onnx.verify(path, accumulator=Accumulator(width), run=False).ok


def render(name: str, rows: list[dict[str, Any]]) -> str:
    """A table for every weight width: dB, and the share of samples with the same class as of the float network."""
    results = {(row["bits"], row["width"], row["method"]): row for row in rows if row["decibels"] is not None}
    parts = []
    for bits in BITS:
        lines: list[list[Cell]] = []
        for width in WIDTHS:
            some = (results.get((bits, width, method)) for method in METHODS)
            lines.append([width, *(None if row is None else _cell(row) for row in some)])
        parts.append(f"### {name}, W{bits}A8: dB (same class %)\n\n{table(('P', *METHODS), lines)}\n")
    return "\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    agreement = "" if row["agreement"] is None else f" ({row['agreement']:.0f})"
    return f"{row['decibels']:.1f}{agreement}" + (f", {row['written']} bits" if row["method"] == REDUCED else "")


def plot(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """A row of panels a network: noise over signal, so that less is better as in the other curves."""
    panels = []
    for name, rows in results.items():
        line = []
        for bits in BITS:
            some = [row for row in rows if row["bits"] == bits and row["decibels"] is not None]
            lines = {m: [(row["width"], 10 ** (-row["decibels"] / 10)) for row in some if row["method"] == m] for m in METHODS}
            line.append(svg.Panel(f"W{bits}A8", "accumulator bits P", "noise / signal", lines))
        panels.append((name, line))
    svg.write(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--networks", nargs="+", default=["resnet", "mobile"], help="folders of WORK (default resnet mobile)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after every row")
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    args = parser.parse_args()
    print(header("Convolutional networks over the width of the accumulator"))
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.networks:
        rows = results.setdefault(name, [])
        with tempfile.TemporaryDirectory() as work, calibrated_once():
            for row in measure(load(args.work / name), Path(work)):
                rows.append(row)
                write_json(args.json, results)
        print(render(name, rows), flush=True)
        if args.plot is not None:
            plot(args.plot, results)


if __name__ == "__main__":
    main()
