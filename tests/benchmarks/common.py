"""What the benchmark programs share: a header, Markdown tables, interleaved timing, the models, onnxruntime's own quantizers.

Heavy imports happen inside functions: programs that measure the memory of a child process must not carry what it does not use.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PACKAGES = ("onnx-magr", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers")
BATCH_SIZE = 16
MINILM = ("model.onnx", "calibration.npz", "calibration_1024/batch_00.npz", "stsb.npz", "stsb_scores.npy")

Cell = str | int | float | None
Feeds = dict[str, npt.NDArray[Any]]


class Unsupported(Exception):
    """A tool does not do what was asked of it; the message says why."""


# --- Text ---------------------------------------------------------------------------------------------------------------------


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions, of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> str:
    """The processor, its cores and its vector extensions that matter here."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    vectors = [
        label for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("avx512_vnni", "VNNI"), ("amx_int8", "AMX")) if flag in flags
    ]
    return f"{name}, {os.cpu_count()} cores{''.join(f', {v}' for v in vectors)}; {platform.system()}, Python {platform.python_version()}"


def header(title: str) -> str:
    """A heading, the machine and the versions."""
    return f"# {title}\n\n{machine()}  \n{', '.join(f'{k} {v}' for k, v in versions().items())}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table, columns padded to be read as text too; columns of text are flush left, of numbers right."""
    cells = [list(columns), *([("-" if c is None else str(c)) for c in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    numeric = [
        all(row[i][:1] in "+-0123456789" for row in cells[1:]) and not any(" x " in row[i] for row in cells) for i in range(len(columns))
    ]
    pad = [str.rjust if right else str.ljust for right in numeric]
    lines = ["| " + " | ".join(p(c, w) for c, w, p in zip(row, widths, pad, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def progress(text: str) -> None:
    """A line on stderr, so that stdout holds the tables alone."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Results with machine and versions, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "versions": versions(), **data}, indent=2) + "\n")


# --- Time ---------------------------------------------------------------------------------------------------------------------


def interleaved(
    functions: Sequence[Callable[[], object]], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of every call; all functions run once a round, in an order that turns round every round.

    Slow drifts of the machine (other work, clock rates) fall on all functions alike, and none always runs in the other's wake. Where other
    work interrupts every round at the same place, ``clock`` is to be ``time.thread_time``, for functions that work on this thread alone.
    """
    for _ in range(warmup):
        for function in functions:
            function()
    seconds: list[list[float]] = [[] for _ in functions]
    for r in range(rounds):
        order = range(len(functions)) if r % 2 == 0 else reversed(range(len(functions)))
        for i in order:
            begin = clock()
            functions[i]()
            seconds[i].append(clock() - begin)
    return seconds


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the smallest and largest value where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- Models and data ----------------------------------------------------------------------------------------------------------


def minilm(data: Path, work: Path) -> Path:
    """The folder of the exported all-MiniLM-L6-v2 and its inputs, made on first use."""
    return encoder(data, work)


def encoder(data: Path, work: Path, weights: Path | None = None) -> Path:
    """The folder of an exported sentence encoder, all-MiniLM-L6-v2 or the one in a folder, and its inputs, made on first use.

    The export runs in a process of its own: torch and transformers stay out of this one.
    """
    folder = work / ("minilm" if weights is None else weights.name)
    if not all((folder / name).is_file() for name in MINILM):
        progress(f"exporting {'all-MiniLM-L6-v2' if weights is None else weights.name}")
        (stsb,) = sorted((data / "stsb").glob("*test*.csv"))[:1] or [data / "stsb" / "stsb-en-test.csv"]
        command = [
            sys.executable,
            "-m",
            "magr_onnx.models.minilm",
            "--books",
            str(data / "books"),
            "--stsb",
            str(stsb),
            "--out",
            str(folder),
            *([] if weights is None else ["--weights", str(weights)]),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the export failed:\n{done.stderr[-3000:]}")
    return folder


class NpzReader:
    """An onnxruntime calibration reader over stacked inputs or a folder of batches: the same that `magr_onnx.optimize` makes of it."""

    def __init__(self, path: Path, batch_size: int = BATCH_SIZE) -> None:
        self.batches: list[Feeds] = []
        for part in sorted(path.glob("*.npz")) if path.is_dir() else [path]:
            with np.load(part) as file:
                arrays = {name: file[name] for name in file.files}
            count = len(next(iter(arrays.values())))
            self.batches += [{n: a[i : i + batch_size] for n, a in arrays.items()} for i in range(0, count, batch_size)]
        self.position = 0

    def get_next(self) -> Feeds | None:
        if self.position == len(self.batches):
            return None
        self.position += 1
        return self.batches[self.position - 1]

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.get_next, None)


def matmulnbits(path: Path) -> list[dict[str, int]]:
    """Integer attributes of every MatMulNBits node of a file, with ``zero_points`` 1 where it has them."""
    import onnx

    return [
        {a.name: a.i for a in node.attribute} | {"zero_points": int(len(node.input) > 3 and bool(node.input[3]))}
        for node in onnx.load(str(path), load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    ]


# --- onnxruntime's own quantizers ---------------------------------------------------------------------------------------------

ORT_TOOLS = {"default": "onnxruntime RTN", "hqq": "onnxruntime HQQ", "k_quant": "onnxruntime k_quant", "gptq": "onnxruntime GPTQ"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, log lines and warnings of the tools."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def import_ort_tools(torch: bool = True) -> Any:
    """The module of onnxruntime's quantizers, loaded ahead of any clock (HQQ needs torch too)."""
    with quiet():
        import onnxruntime.quantization.matmul_nbits_quantizer as tools

        if torch:
            with contextlib.suppress(ImportError):
                __import__("torch")
    return tools


def ort_quantize(tool: str, model: Path, calibration: Path, output: Path, bits: int, block: int | None) -> None:
    """Quantize ``model`` with one of onnxruntime's own tools, asymmetric, into MatMulNBits nodes.

    The model is loaded afresh, because the tools change the one they are given.

    Raises:
        Unsupported: The tool rejects the setting, or writes something else without a word.
    """
    tools = import_ort_tools(torch=tool == "hqq")
    with quiet():
        try:
            config = _config(tools, tool, calibration, bits, block)
            if not hasattr(config, "bits") and bits != 4:
                raise Unsupported("this tool has no bits option and always writes 4 bits")
            _process(tools, config, model, output, bits, block)
        except Unsupported:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise Unsupported(f"{type(error).__name__}: {lines[0] if lines else 'no message'}") from error
    written = {node["bits"] for node in matmulnbits(output)}
    if written != {bits}:
        raise Unsupported(f"it wrote {', '.join(f'{b}-bit' for b in sorted(written)) or 'no MatMulNBits'} nodes")


def _config(tools: Any, tool: str, calibration: Path, bits: int, block: int | None) -> Any:
    if tool == "default":
        per_channel = block is None
        return tools.DefaultWeightOnlyQuantConfig(
            block_size=block or 128, is_symmetric=False, bits=bits, channel_wised_quantize=per_channel
        )
    if tool == "hqq":
        return tools.HQQWeightOnlyQuantConfig(block_size=block or 128, bits=bits)
    if tool == "k_quant":
        return tools.KQuantWeightOnlyQuantConfig()
    return tools.GPTQWeightOnlyQuantConfig(calibration_data_reader=NpzReader(calibration))


def _process(tools: Any, config: Any, model: Path, output: Path, bits: int, block: int | None) -> None:
    import onnx

    quantizer = tools.MatMulNBitsQuantizer(
        onnx.load(str(model)), bits=bits, block_size=block or 128, is_symmetric=False, algo_config=config
    )
    if block is None:
        raise Unsupported("its MatMulNBits nodes cannot have one scale a channel")
    quantizer.process()
    onnx.save(quantizer.model.model, str(output))


# --- onnxruntime's 8-bit quantizers -------------------------------------------------------------------------------------------


def ort_static(model: Path, calibration: Path, output: Path, batch_size: int = BATCH_SIZE, **options: Any) -> None:
    """Quantize ``model`` with ``onnxruntime.quantization.quantize_static``; ``options`` are its own.

    Raises:
        Unsupported: It fails.
    """
    with quiet():
        from onnxruntime.quantization import quantize_static

        _said(lambda: quantize_static(str(model), str(output), NpzReader(calibration, batch_size), **options))


def ort_dynamic(model: Path, output: Path, **options: Any) -> None:
    """Quantize ``model`` with ``onnxruntime.quantization.quantize_dynamic``; ``options`` are its own.

    Raises:
        Unsupported: It fails.
    """
    with quiet():
        from onnxruntime.quantization import quantize_dynamic

        _said(lambda: quantize_dynamic(str(model), str(output), **options))


def _said(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Unsupported(f"{type(error).__name__}: {lines[0] if lines else 'no message'}") from error


def linear_layers(model: Path) -> list[str]:
    """Names of the nodes we quantize."""
    import magr_onnx

    return [row["name"] for row in magr_onnx.inspect(model).layers]
