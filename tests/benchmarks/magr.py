"""The tables of docs/methods/magr.md: what MagR gains, by model, grid and quantizer, and in which order with other steps.

    python tests/benchmarks/magr.py --data DATA --work WORK [--models gemma,mpnet,minilm] [--bits 3,2] [--methods TEXT] [--samples 32]
    python tests/benchmarks/magr.py --data DATA --work WORK --orders --models lm,minilm

One scale per channel, asymmetric, the head of language models float. ``DATA``, ``WORK`` and models as in accuracy.py.

Language models: cross-entropy above the float model's, and mean KL divergence from it, in nats. Encoders: 1 minus the mean cosine to the
float embeddings over every fourth pair of STS-B (mpnet: every sixteenth), and Spearman's correlation with its scores.
"""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accuracy import MODELS, Benchmark, float_outputs, is_language, sentence_encoder
from common import Cell, header, progress, table

import magr_onnx
from magr_onnx.runtime.measure.validate import log_softmax
from magr_onnx.runtime.ort.session import Session

Options = dict[str, Any]

BETA = {4: 1.0, 3: 0.9, 2: 0.8}
"""The paper's factors on min-max ranges, by bits."""
MAGR = "magr{alpha=1e-3}"
AUTHORS = "magr{alpha=1e-3,relative=false,method=authors,damping=0}"


def methods(bits: int) -> dict[str, Options]:
    """Options by name. *Paper*: min-max grids times beta, damping 0.01, natural order, nothing centred, no bias; then ours."""
    grid = f"bits={bits},block_size=channel,beta={BETA[bits]},damping=0.01,act_order=false"
    gptq = f"quantize{{method=gptq,{grid}}},emit-matmulnbits"
    ours: Options = {"bits": bits, "block_size": None, "accuracy_level": 0}
    return {
        "paper: GPTQ": {"pipeline_text": gptq},
        "paper: MagR, GPTQ": {"pipeline_text": f"{AUTHORS},{gptq}"},
        "min-max GPTQ": {**ours, "quantizer": "gptq", "beta": BETA[bits], "alpha": 0},
        "min-max MagR, GPTQ": {**ours, "quantizer": "gptq", "beta": BETA[bits]},
        "GPTQ": {**ours, "quantizer": "gptq", "alpha": 0},
        "MagR, GPTQ": {**ours, "quantizer": "gptq"},
        "balanced without MagR": {**ours, "effort": "balanced", "alpha": 0},
        "balanced": {**ours, "effort": "balanced"},
    }


def orders(bits: int) -> dict[str, tuple[str | None, Options]]:
    """A pipeline that makes a float model first, or none, and the options it is then quantized with, by the order of the steps."""
    gptq: Options = {"bits": bits, "block_size": None, "accuracy_level": 0, "quantizer": "gptq"}
    found: dict[str, tuple[str | None, Options]] = {"GPTQ": (None, {**gptq, "alpha": 0}), "MagR": (None, gptq)}
    steps: dict[str, Options] = {"feedback": {"feedback": True}, "equalization": {"equalize": True}, "rotation": {"rotate": "on"}}
    for name, step in steps.items():
        found[name] = (None, {**gptq, **step, "alpha": 0})
        found[f"{name}, MagR"] = (None, {**gptq, **step})
        found[f"MagR, {name}"] = (MAGR, {**gptq, **step, "alpha": 0})
    everything: Options = {**gptq, "feedback": True, "equalize": True, "rotate": "on"}
    found["rotation, equalization, feedback"] = (None, {**everything, "alpha": 0})
    found["rotation, equalization, feedback, MagR"] = (None, everything)
    return found


FOUND = {**MODELS, "minilm": lambda data, work: sentence_encoder(data, work, every=4)}


def samples(calibration: Path, count: int) -> dict[str, npt.NDArray[Any]]:
    """The first calibration samples, of an .npz, or of a folder of them the .npz of 128 samples beside it."""
    with np.load(calibration if calibration.is_file() else calibration.parent / "calibration.npz") as file:
        return {name: file[name][:count] for name in file.files}


def judge(benchmark: Benchmark, path: Path, reference: npt.NDArray[Any]) -> str:
    """Both figures of a quantized file."""
    if not is_language(benchmark):
        cosine, correlation = benchmark.metrics(benchmark.outputs(path), reference)
        return f"{1 - cosine:.4f} ({correlation:.4f})"
    found = []
    with Session(benchmark.model) as a, Session(path) as b:
        for block in benchmark.test["input_ids"]:
            p, q = (log_softmax(session.run({"input_ids": block[None]})[0][0, :-1]) for session in (a, b))
            rows, following = np.arange(len(p)), block[1:]
            found.append(((p - q)[rows, following].mean(dtype=np.float64), (np.exp(p) * (p - q)).sum(axis=-1).mean(dtype=np.float64)))
    over, divergence = np.mean(found, axis=0)
    return f"{over:+.4f} ({divergence:.4f})"


def cell(benchmark: Benchmark, calibration: Options, work: Path, options: Options, first: str | None = None) -> str:
    """Quantize, judge the file, delete it; with ``first``, quantize what this pipeline makes of the float model."""
    output, source = work / "magr_quantized.onnx", benchmark.model
    one = {name: array[:1, :8] for name, array in calibration.items()}  # the comparison is made here, of more
    try:
        if first is not None:
            source = work / "magr_float.onnx"
            magr_onnx.optimize(benchmark.model, calibration, output=source, pipeline_text=first, progress=False)
        magr_onnx.optimize(source, calibration, output=output, validation_data=one, progress=False, **options)
        reference = np.empty(0) if is_language(benchmark) else float_outputs(benchmark.model.parent.name, benchmark, work)
        return judge(benchmark, output, reference)
    except magr_onnx.MagrError as error:
        progress(str(error).splitlines()[0])
        return "-"
    finally:
        for path in (*work.glob("magr_quantized.onnx*"), *work.glob("magr_float.onnx*")):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the models' data")
    parser.add_argument("--work", type=Path, required=True, help="folder for exported encoders and temporary files")
    parser.add_argument("--models", default="gemma,mpnet,minilm", help=f"comma-separated, of {','.join(FOUND)}")
    parser.add_argument("--bits", default="3,2", help="comma-separated")
    parser.add_argument("--methods", default="*", help="shell patterns of methods or orders, separated by semicolons")
    parser.add_argument("--orders", action="store_true", help="the table of orders")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of language models")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(header("MagR by model, grid and quantizer"))
    every: list[int] = [int(bits) for bits in args.bits.split(",")]
    rows: dict[str, list[Cell]] = {}
    columns = []
    for model in args.models.split(","):
        benchmark = FOUND[model](args.data, args.work)
        if is_language(benchmark):
            benchmark = replace(benchmark, test={"input_ids": benchmark.test["input_ids"][: args.blocks]})
        calibration = samples(benchmark.calibration, args.samples)
        for bits in every:
            columns.append(f"{model}, {bits} bits")
            tried = orders(bits) if args.orders else {name: (None, options) for name, options in methods(bits).items()}
            for name, (first, options) in tried.items():
                if any(fnmatch.fnmatch(name, pattern) for pattern in args.methods.split(";")):
                    found = cell(benchmark, calibration, args.work, options, first)
                    progress(f"{columns[-1]}, {name}: {found}")
                    rows.setdefault(name, [name]).append(found)
    print(table(("steps" if args.orders else "method", *columns), list(rows.values())), flush=True)


if __name__ == "__main__":
    main()
