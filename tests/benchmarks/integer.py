"""8-bit integer formats, accumulators included: onnxruntime's own quantizers and ours.

    python tests/benchmarks/integer.py --data DATA --work WORK [--tables accuracy,constraint,curve,latency,verify] [--models minilm,tiny]

Every number is measured on the emitted file on disk, run by onnxruntime. ``DATA``, ``WORK`` and the models are those of ``accuracy.py``.

- ``accuracy``: metrics, seconds from file to file and size of every quantizer. Cross-entropy of some 10,000 tokens does not tell 8-bit
  files apart; the divergence (KL) of a language model's distributions from the float model's does.
- ``constraint``: what it costs that no accumulator can saturate on x86 without VNNI: onnxruntime's way (7-bit weights) and ours (pairs of
  8-bit weights that fit), both with the same layers and the same ranges of the activations.
- ``curve``: loss over the width P of the accumulator, whole dot products and tiles of 64, and its plot (``--plot``). On every 8th pair of
  STS-B for the encoder and on every 4th held-out block of the bundled model, by cross-entropy and by the divergence from the float model.
- ``latency``: one thread, sessions that take turns.
- ``verify``: which layers of onnxruntime's files can saturate, by `magr_onnx.verify` and by onnxsim.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import curve
import numpy as np
import numpy.typing as npt
from accuracy import MODELS, Benchmark, Footnotes, divergences, float_outputs, is_language, metric_cells
from common import (
    Cell,
    Feeds,
    Unsupported,
    header,
    interleaved,
    linear_layers,
    ort_dynamic,
    ort_static,
    progress,
    quiet,
    table,
    write_json,
)
from emitted import feeds as tokens
from emitted import numbers, runner

import magr_onnx
from magr_onnx.runtime.ort.session import Session

TARGET = "x86-avx2"
Make = Callable[[Path, Path, Path], object]
"""Writes the quantized file: ``make(model, calibration, output)``."""


def ours(**options: Any) -> Make:
    return lambda model, calibration, output: magr_onnx.optimize(model, calibration, output=output, **options)


def static(same_layers: bool = False, **options: Any) -> Make:
    def make(model: Path, calibration: Path, output: Path) -> None:
        ort_static(model, calibration, output, **({"nodes_to_quantize": linear_layers(model)} if same_layers else {}), **options)

    return make


def dynamic(same_layers: bool = False, **options: Any) -> Make:
    def make(model: Path, calibration: Path, output: Path) -> None:
        ort_dynamic(model, output, **({"nodes_to_quantize": linear_layers(model)} if same_layers else {}), **options)

    return make


STATIC, DYNAMIC = {"format": "qdq-int8"}, {"format": "dynamic-int8"}
METHODS: dict[str, Make] = {
    "onnxruntime static": static(),
    "onnxruntime static, same layers": static(True),
    "onnxruntime static, same layers, per channel": static(True, per_channel=True),
    "onnxruntime dynamic": dynamic(),
    "onnxruntime dynamic, per channel": dynamic(per_channel=True),
    "onnxruntime dynamic, same layers, per channel": dynamic(True, per_channel=True),
    "ours static": ours(**STATIC),
    "ours dynamic": ours(**DYNAMIC),
    f"ours static, {TARGET}": ours(**STATIC, target=TARGET),
    f"ours dynamic, {TARGET}": ours(**DYNAMIC, target=TARGET),
    "ours static, 4-bit weights": ours(**STATIC, bits=4),
}


def timed(make: Make, benchmark: Benchmark, output: Path) -> float:
    """Seconds from file to file."""
    output.unlink(missing_ok=True)
    begin = time.perf_counter()
    make(benchmark.model, benchmark.calibration, output)
    return time.perf_counter() - begin


# --- Accuracy -----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """One file: its metrics, or why there is none."""

    method: str
    metrics: tuple[float, float] | None = None
    divergence: float | None = None
    seconds: float | None = None
    megabytes: float | None = None
    reason: str | None = None


def accuracy(name: str, benchmark: Benchmark, reference: npt.NDArray[Any], work: Path) -> tuple[str, list[dict[str, Any]]]:
    language = is_language(benchmark)
    rows = [Row("float", benchmark.metrics(reference, reference), 0.0 if language else None, None, benchmark.model.stat().st_size / 1e6)]
    output = work / f"{name}_integer.onnx"
    for method, make in METHODS.items():
        row = Row(method)
        try:
            row.seconds = timed(make, benchmark, output)
            row.metrics = benchmark.metrics(benchmark.outputs(output), reference)
            row.divergence = float(divergences(benchmark, output).mean()) if language else None
            row.megabytes = output.stat().st_size / 1e6
        except (Unsupported, magr_onnx.MagrError) as error:
            row.reason = str(error).splitlines()[0]
        output.unlink(missing_ok=True)
        progress(f"{name}, {method}: {row.reason or row.metrics} ({row.seconds or 0:.1f} s)")
        rows.append(row)
    notes = Footnotes()
    lines: list[list[Cell]] = []
    for row in rows:
        a, b = (notes.mark(row.reason or "no reason given"), None) if row.metrics is None else metric_cells(benchmark, row.metrics)
        done = row.metrics is not None and row.seconds is not None
        extra = [None if row.divergence is None else f"{row.divergence:.5f}"] if language else []
        lines.append([row.method, a, b, *extra, f"{row.seconds:.1f}" if done else None, row.megabytes and f"{row.megabytes:.2f}"])
    text = table(("method", *benchmark.columns, *(["KL from float"] if language else []), "seconds", "MB"), lines)
    return "\n".join([text, *([""] if notes.reasons else []), *notes.lines()]), [asdict(row) for row in rows]


# --- The cost of the constraint -----------------------------------------------------------------------------------------------


def overrides(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Scale and zero point of every quantized activation of a file, as onnxruntime's option TensorQuantOverrides."""
    import onnx
    from onnxruntime.quantization import QuantType

    graph = onnx.load(str(path)).graph
    constant = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    return {
        node.input[0]: [
            {
                "scale": constant[node.input[1]].reshape(()),
                "zero_point": constant[node.input[2]].reshape(()),
                "quant_type": QuantType.QUInt8,
            }
        ]
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }


def ort_on_ranges_of(path: Path, benchmark: Benchmark, output: Path, reduce_range: bool) -> None:
    """onnxruntime's static quantizer on the layers and the activation ranges of ``path``; weights per channel."""
    from onnxruntime.quantization import QuantType

    ort_static(
        benchmark.model,
        benchmark.calibration,
        output,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_quantize=linear_layers(benchmark.model),
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"TensorQuantOverrides": overrides(path), "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


Losses = Callable[[Path], npt.NDArray[np.float64]]


def judges(benchmark: Benchmark, reference: npt.NDArray[Any]) -> dict[str, Losses]:
    """Losses of a file against the float model, one of every sentence or batch of blocks; their mean is the loss."""
    if not is_language(benchmark):

        def cosines(path: Path) -> npt.NDArray[np.float64]:
            y = benchmark.outputs(path)
            return 1 - (y * reference).sum(axis=1) / np.linalg.norm(y, axis=1) / np.linalg.norm(reference, axis=1)

        return {"1 - cosine": cosines}

    def cross_entropies(path: Path) -> npt.NDArray[np.float64]:
        y = benchmark.outputs(path)
        return (y[:, 0] - reference[:, 0]) / y[:, 1].mean()

    return {"cross-entropy": cross_entropies, "KL from float": lambda path: divergences(benchmark, path)}


CONSTRAINT_COLUMNS = ("loss", "method", "without", "with", "cost", "standard error", "cost / reduce_range's", "layers that can saturate")


def constraint(name: str, benchmark: Benchmark, reference: npt.NDArray[Any], work: Path) -> tuple[str, list[dict[str, Any]]]:
    files = [work / f"{name}_{kind}.onnx" for kind in ("ort", "ort_reduced", "ours", "ours_target")]
    ours(**STATIC)(benchmark.model, benchmark.calibration, files[2])
    ours(**STATIC, target=TARGET)(benchmark.model, benchmark.calibration, files[3])
    for path, reduce_range in zip(files[:2], (False, True), strict=True):
        ort_on_ranges_of(files[2], benchmark, path, reduce_range)
    failing = [len(magr_onnx.verify(path, target=TARGET, run=False).failed) for path in files]
    rows: list[dict[str, Any]] = []
    for loss, judge in judges(benchmark, reference).items():
        losses = [judge(path) for path in files]
        costs = [losses[1] - losses[0], losses[3] - losses[2]]
        for i, method in enumerate(("onnxruntime, reduce_range", f"ours, {TARGET}")):
            rows.append(
                {
                    "loss": loss,
                    "method": method,
                    "without": float(losses[2 * i].mean()),
                    "with": float(losses[2 * i + 1].mean()),
                    "cost": float(costs[i].mean()),
                    "standard_error": float(costs[i].std(ddof=1) / len(costs[i]) ** 0.5),
                    "ratio": float(costs[i].mean() / costs[0].mean()),
                    "saturate": [failing[2 * i], failing[2 * i + 1]],
                }
            )
        progress(f"{name}, constraint, {loss}: {rows[-2]['cost']:.6f} reduce_range, {rows[-1]['cost']:.6f} ours, {rows[-1]['ratio']:.3f}")
    for path in files:
        path.unlink()
    layers = len(linear_layers(benchmark.model))
    lines: list[list[Cell]] = [
        [
            row["loss"],
            row["method"],
            f"{row['without']:.5f}",
            f"{row['with']:.5f}",
            f"{row['cost']:+.5f}",
            f"{row['standard_error']:.5f}",
            f"{row['ratio']:.3f}",
            f"{row['saturate'][0]} to {row['saturate'][1]} of {layers}",
        ]
        for row in rows
    ]
    return table(CONSTRAINT_COLUMNS, lines), rows


# --- Latency ------------------------------------------------------------------------------------------------------------------

TIMED: dict[str, Make] = {
    "onnxruntime dynamic": METHODS["onnxruntime dynamic"],
    "onnxruntime static, same layers": METHODS["onnxruntime static, same layers"],
    "ours static": METHODS["ours static"],
    f"ours static, {TARGET}": METHODS[f"ours static, {TARGET}"],
    "ours dynamic": METHODS["ours dynamic"],
    "ours static, 4-bit weights": METHODS["ours static, 4-bit weights"],
}


def inputs_of(benchmark: Benchmark, batch: int, length: int) -> Feeds:
    """Random tokens for an encoder; held-out blocks for a language model."""
    if "attention_mask" in benchmark.test:
        return tokens(batch, length)
    return {name: np.ascontiguousarray(array[:batch]) for name, array in benchmark.test.items()}


def latency(name: str, benchmark: Benchmark, work: Path, batches: Sequence[int], runs: int) -> tuple[str, list[dict[str, Any]]]:
    files = {method: work / f"{name}_latency_{i}.onnx" for i, method in enumerate(TIMED)}
    seconds = {method: timed(make, benchmark, files[method]) for method, make in TIMED.items()}
    sessions = [Session(path, threads=1) for path in (benchmark.model, *files.values())]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        progress(f"{name}, batch {batch}: {runs} runs of each")
        inputs = inputs_of(benchmark, batch, 32)
        times = interleaved([runner(s, inputs) for s in sessions], runs, warmup=5)
        for method, taken in zip(("float", *files), times, strict=True):
            rows.append(
                {
                    "batch": batch,
                    "method": method,
                    "quantize_seconds": seconds.get(method),
                    "ms": 1000 * statistics.median(taken),
                    "over_float": statistics.median(a / b for a, b in zip(taken, times[0], strict=True)),
                    "over_dynamic": statistics.median(a / b for a, b in zip(taken, times[1], strict=True)),
                }
            )
    for session in sessions:
        session.close()
    for path in files.values():
        path.unlink()
    lines: list[list[Cell]] = [
        [
            r["batch"],
            r["method"],
            r["quantize_seconds"] and f"{r['quantize_seconds']:.1f}",
            f"{r['ms']:.2f}",
            f"{r['over_float']:.3f}",
            f"{r['over_dynamic']:.3f}",
        ]
        for r in rows
    ]
    columns = ("batch", "method", "seconds to quantize", "ms a run", "/ float", "/ onnxruntime dynamic")
    return table(columns, lines), rows


# --- Proofs -------------------------------------------------------------------------------------------------------------------


def _operators(model: Path, calibration: Path, output: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType

    ort_static(model, calibration, output, quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8)


PROVED: dict[str, Make] = {
    "onnxruntime static": METHODS["onnxruntime static"],
    "onnxruntime static, uint8, as operators": _operators,
    "onnxruntime dynamic": METHODS["onnxruntime dynamic"],
    f"ours static, {TARGET}": METHODS[f"ours static, {TARGET}"],
    f"ours dynamic, {TARGET}": METHODS[f"ours dynamic, {TARGET}"],
}


def by_onnxsim(path: Path) -> tuple[dict[str, bool], float] | None:
    """Whether a pair of products can saturate, by layer, of the layers that onnxsim's model of such kernels covers; and its seconds."""
    try:
        import onnx
        from onnxsim import quant_int_verify as tool
    except ImportError:
        return None
    model = onnx.load(str(path))
    begin = time.perf_counter()
    report = tool.verify_model(model, semantics=tool.U8S8_PAIR_SATURATING, z3_max_k=0)
    seconds = time.perf_counter() - begin
    found = {layer.name: [f.verdict == tool.REFUTED for f in layer.of("pair-saturation")] for layer in report.layers}
    return {name: any(verdicts) for name, verdicts in found.items() if verdicts}, seconds


def verify(name: str, benchmark: Benchmark, work: Path) -> tuple[str, list[dict[str, Any]]]:
    output = work / f"{name}_verify.onnx"
    rows: list[dict[str, Any]] = []
    for method, make in PROVED.items():
        try:
            timed(make, benchmark, output)
        except Unsupported as reason:
            progress(f"{name}, {method}: {reason}")
            continue
        begin = time.perf_counter()
        found = magr_onnx.verify(output, target=TARGET, run=False)
        row: dict[str, Any] = {"method": method, "layers": len(found.layers), "saturate": len(found.failed)}
        row["seconds"] = time.perf_counter() - begin
        failed = {layer.name for layer in found.failed}
        with quiet():
            theirs = by_onnxsim(output)
        if theirs is not None and theirs[0]:
            verdicts, row["onnxsim_seconds"] = theirs
            known = {layer.name for layer in found.layers}
            row["compared"] = len(known & verdicts.keys())
            row["agree"] = sum((n in failed) == verdicts[n] for n in known & verdicts.keys())
        progress(f"{name}, {method}: {row}")
        rows.append(row)
        output.unlink()
    lines: list[list[Cell]] = [
        [
            r["method"],
            r["layers"],
            r["saturate"],
            f"{r['seconds']:.2f}",
            f"{r['agree']} of {r['compared']}" if "compared" in r else None,
            f"{r['onnxsim_seconds']:.2f}" if "compared" in r else None,
        ]
        for r in rows
    ]
    return table(("file", "integer layers", "can saturate", "seconds", "onnxsim agrees on", "its seconds"), lines), rows


# --- The program --------------------------------------------------------------------------------------------------------------

TITLES = {
    "accuracy": "Accuracy",
    "constraint": "What the constraint costs",
    "curve": "Accuracy over the width of the accumulator",
    "latency": "Latency, one thread",
    "verify": f"Proofs for {TARGET}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books, stsb, lm and charlm")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported encoder, float results and temporary files")
    parser.add_argument("--tables", default=",".join(TITLES), help=f"comma-separated (default {','.join(TITLES)})")
    parser.add_argument(
        "--models", default=",".join(MODELS), help=f"comma-separated (default {','.join(MODELS)}; curve: {','.join(curve.MODELS)})"
    )
    parser.add_argument("--batches", type=numbers, default="1,16", help="batch sizes of latency (default 1,16)")
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each file at each batch size (default 100)")
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    parser.add_argument("--json", type=Path, help="write the rows to this file too, after every model")
    args = parser.parse_args()
    tables, models = args.tables.split(","), args.models.split(",")
    for given, known in ((tables, TITLES), (models, MODELS)):
        if unknown := [g for g in given if g not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    args.work.mkdir(parents=True, exist_ok=True)
    with quiet():
        import onnxruntime.quantization  # noqa: F401  ahead of any clock

    print(header("8-bit integer formats"))
    results: dict[str, dict[str, Any]] = {}
    for name in tables:
        print(f"## {TITLES[name]}\n", flush=True)
        found = results.setdefault(name, {})
        if name == "curve":
            curves([m for m in models if m in curve.MODELS], found, results, args)
            continue
        for model in models:
            try:
                benchmark = MODELS[model](args.data, args.work)
                text, rows = run(name, model, benchmark, args)
            except Unsupported as reason:
                print(f"### {model}\n\nSkipped: {reason}.\n", flush=True)
                continue
            print(f"### {benchmark.title}\n\n{text}\n", flush=True)
            found[model] = {"title": benchmark.title, "rows": rows}
            write_json(args.json, results)


def curves(models: Sequence[str], found: dict[str, Any], results: dict[str, Any], args: argparse.Namespace) -> None:
    """The curves of the models, and their plot; results are written after every file."""
    done: list[tuple[Benchmark, list[dict[str, Any]]]] = []
    for model in models:
        benchmark = curve.MODELS[model](args.data, args.work)
        reference = float_outputs(f"{model}_curve", benchmark, args.work)
        rows = found.setdefault(model, {"title": benchmark.title, "rows": []})["rows"]
        for row in curve.measure(benchmark, reference, args.work):
            rows.append(row)
            write_json(args.json, results)
        print(curve.render(benchmark, rows), flush=True)
        done.append((benchmark, rows))
        if args.plot is not None:
            curve.plot(args.plot, done)


def run(name: str, model: str, benchmark: Benchmark, args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """One table of one model, as text and as data."""
    if name == "latency":
        return latency(model, benchmark, args.work, args.batches, args.runs)
    if name == "verify":
        return verify(model, benchmark, args.work)
    reference = float_outputs(model, benchmark, args.work)
    return (accuracy if name == "accuracy" else constraint)(model, benchmark, reference, args.work)


if __name__ == "__main__":
    main()
