"""The tables of docs/benchmarks.md: what optional methods do to the bundled language model.

    python tests/benchmarks/methods.py

Perplexity on all 256 held-out windows (`magr_onnx.cli.commands.demo` takes half of them), of the written file, run by onnxruntime. Takes
about ten minutes. The second table is what calibration data does to quantizers that need none: both MagR and bias correction read it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from accuracy import Benchmark, bundled_lm
from common import Cell, header, progress, table

import magr_onnx
from magr_onnx.runtime.ort.session import Arithmetic

ROUNDING = {"quantizer": "rtn", "alpha": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits, block 32, default": {"bits": 4},
    "4 bits, block 32, GPTQ without MagR": {"bits": 4, "quantizer": "gptq", "alpha": 0},
    "4 bits, block 32, rounding, searched grid": {"bits": 4, **ROUNDING},
    "2 bits, block 32, default": {"bits": 2},
    "2 bits, block 32, rounding, searched grid": {"bits": 2, **ROUNDING},
    "8 bits, `--format qdq-int8`": {"format": "qdq-int8"},
}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "`--low-rank 8`": {"low_rank": 8},
    "`--low-rank 16`": {"low_rank": 16},
    "`--equalize`": {"equalize": True},
    "`--split-outliers`": {"split_outliers": True},
    "`--twin-ranges`": {"twin_ranges": True},
}
DATA_FREE = {
    "4 bits, rounding": {"bits": 4, "quantizer": "rtn"},
    "4 bits, HQQ": {"bits": 4, "quantizer": "hqq"},
    "2 bits, rounding": {"bits": 2, "quantizer": "rtn"},
    "2 bits, HQQ": {"bits": 2, "quantizer": "hqq"},
}
WITH_DATA: dict[str, dict[str, Any]] = {
    "with it": {},
    "and `--alpha 0`": {"alpha": 0},
    "and `--bias none`": {"bias": "none"},
    "and both": {"alpha": 0, "bias": "none"},
}


def perplexity(benchmark: Benchmark, path: Path, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> float:
    sums = benchmark.outputs(path, arithmetic)
    return math.exp(benchmark.metrics(sums, sums)[0])


def cell(benchmark: Benchmark, work: Path, options: dict[str, Any], data: bool = True) -> str:
    """Perplexity and megabytes of the model with some options; why not, where they are refused."""
    output = work / "model.onnx"
    try:
        magr_onnx.optimize(benchmark.model, benchmark.calibration if data else None, output=output, progress=False, **options)
    except magr_onnx.OptionError as error:
        progress(f"{options}: {error}")
        return "-"
    text = f"{perplexity(benchmark, output):.3f} ({output.stat().st_size / 1e6:.2f} MB)"
    progress(f"{options}, {'with' if data else 'without'} data: {text}")
    output.unlink()
    return text


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as folder:
        work = Path(folder)
        benchmark = bundled_lm(work, work)
        print(header("Methods on the bundled language model"))
        print(f"Float: {perplexity(benchmark, benchmark.model):.3f}\n", flush=True)
        rows: list[list[Cell]] = [
            [name, *(cell(benchmark, work, {**options, **method}) for method in METHODS.values())] for name, options in SETTINGS.items()
        ]
        print(table(("setting", *METHODS), rows), flush=True)
        rows = [
            [name, cell(benchmark, work, options, data=False), *(cell(benchmark, work, {**options, **more}) for more in WITH_DATA.values())]
            for name, options in DATA_FREE.items()
        ]
        print("\n" + table(("block 32", "without calibration", *WITH_DATA), rows))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
