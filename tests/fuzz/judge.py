"""What became of one model: converted and right, refused with a reason, or a bug."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from magr_onnx import optimize
from magr_onnx.errors import MagrError, RuntimeFailure
from magr_onnx.model_io import validate_proto
from magr_onnx.runtime.ort.session import Arithmetic, Session

Feeds = Mapping[str, Any]

CONVERTED, REFUSED, FLOAT_FAILS = "converted", "refused", "onnxruntime refuses the float model"
LIES = "the model declares shapes that its values do not have"
LARGEST = 1 << 27  # bytes of outputs that are compared, in little memory
CONTRADICTS = "onnxruntime's optimizer changes the float model"
BUGS = ("error", "unloadable", "fails to run", "wrong", "crash", "timeout", "left files")
"""Outcomes that are ours: no MagrError, a result onnxruntime does not load or run, other outputs, a dead process ..."""

OPTIONS: dict[str, dict[str, Any]] = {
    "matmulnbits": {"format": "matmulnbits", "bits": 8},
    "qdq": {"format": "qdq", "bits": 8},
    "dynamic-int8": {"format": "dynamic-int8"},
}
ALL: dict[str, Any] = {"include": ["*"]}
"""Options with which layers are converted that a file is larger by, as most of small graphs are."""
TOLERANCE = {"matmulnbits": 0.06, "qdq": 0.06, "qdq-int8": 0.3, "dynamic-int8": 0.15}
"""Of the largest output, by format, at 8 bits."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One of the words above, and the rest of the sentence."""

    kind: str
    detail: str = ""
    layers: int = 0
    skipped: int = 0

    @property
    def bug(self) -> bool:
        return self.kind in BUGS


def judge(
    model: onnx.ModelProto | bytes,
    feeds: Feeds | None,
    options: Mapping[str, Any],
    calibration: Any = None,
    at: Callable[[str], None] = lambda stage: None,
    files: Mapping[str, bytes] | None = None,
    values: bool = True,
) -> Outcome:
    """Optimize a model in a folder of its own and compare the result with it.

    Args:
        model: The model, or the bytes of a file.
        feeds: Inputs to compare on; None only loads the result.
        options: Of `magr_onnx.optimize`.
        calibration: Data for it.
        at: Called with the name of every stage before it begins, so that who watches the process knows where it died.
        files: External data, by name.
        values: Whether values are compared; types and shapes are anyway.
    """
    folder = Path(tempfile.mkdtemp(prefix="judge-"))
    try:
        path = folder / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        return _judge(path, folder / "out.onnx", feeds, options, calibration, at, values)
    finally:
        shutil.rmtree(folder)


def _judge(
    path: Path,
    out: Path,
    feeds: Feeds | None,
    options: Mapping[str, Any],
    calibration: Any,
    at: Callable[[str], None],
    values: bool,
) -> Outcome:
    expected: list[Any] | None = None
    fused: list[Any] = []
    before = set(path.parent.iterdir())
    at("float")
    try:
        with Session(path, arithmetic=Arithmetic.UNOPTIMIZED, threads=1) as session, Session(path, threads=1) as optimized:
            if feeds is not None:
                expected, again, fused = session.run(feeds), session.run(feeds), optimized.run(feeds)
        loads = True
    except Exception as error:  # a session is not made of files that were never checked; `optimize` is, and has to explain itself
        loads, reason = False, "and optimize does not: " + ("run" if "failed on" in str(error) else "load")
    at("optimize")
    try:
        report = optimize(path, calibration, output=out, **options).report
    except MagrError as error:
        if "please report" in str(error):
            return Outcome(LIES if _converts_undeclared(path, out, calibration, options) else "error", str(error))
        if left := set(path.parent.iterdir()) - before:
            return Outcome("left files", str(sorted(left)))
        return Outcome(REFUSED, reason_of(error)) if loads else Outcome(FLOAT_FAILS, reason_of(error))
    except Exception as error:
        return Outcome("error", f"{type(error).__name__}: {error}")
    if not loads:
        return Outcome(FLOAT_FAILS, reason)
    if expected is not None and sum(np.asarray(y).nbytes for y in expected if not isinstance(y, list)) > LARGEST:
        feeds = None
    counts = len(report.layers), len(report.skipped)
    at("result")
    try:
        session = Session(out, threads=1)
    except RuntimeFailure as error:
        return Outcome("unloadable", str(error), *counts)
    with session:
        if expected is None or feeds is None:
            return Outcome(CONVERTED, "not run", *counts)
        try:
            got = session.run(feeds)
        except RuntimeFailure as error:
            return Outcome("fails to run", str(error), *counts)
    tolerance = TOLERANCE[options.get("format", "matmulnbits")] if values else np.inf
    for name, ours, floats, repeated, other in zip(session.outputs, got, expected, again, fused, strict=True):
        if difference(floats, repeated, 0.0) is not None:
            continue  # random
        if problem := difference(floats, ours, tolerance):
            if difference(floats, other, tolerance):
                return Outcome(CONTRADICTS, name, *counts)
            if _explained(path, feeds, name, floats, ours, options):
                continue
            return Outcome("wrong", f"output {name}: {problem}", *counts)
    return Outcome(CONVERTED, "", *counts)


def _converts_undeclared(path: Path, out: Path, calibration: Any, options: Mapping[str, Any]) -> bool:
    """Whether the model is converted once it says nothing of shapes any more, except those of its inputs."""
    model = onnx.load(path)
    nodes = list(model.graph.node)
    graphs = [model.graph]
    while nodes:
        inner = [g for a in nodes.pop().attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
        graphs += inner
        nodes += [n for g in inner for n in g.node]
    for graph in graphs:
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
    try:
        optimize(model, calibration, output=out, **options)
    except MagrError:
        return False
    return True


def _explained(path: Path, feeds: Feeds, name: str, floats: Any, ours: Any, options: Mapping[str, Any]) -> bool:
    """Whether noise of the size of rounding in all matrices changes an output, where terms cancel, by as much as quantizing did."""
    rng, largest, noisy = np.random.default_rng(0), 0.0, path.with_name("noisy.onnx")
    for _ in range(4):
        model = onnx.load(path)
        graphs = list(validate_proto.graphs(model))
        held = [t for g in graphs if isinstance(g, onnx.GraphProto) for t in (*g.initializer, *(s.values for s in g.sparse_initializer))]
        held += [a.t for g in graphs for n in g.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")]
        for tensor in held:
            array = onnx.numpy_helper.to_array(tensor)
            if array.dtype.kind == "f" and array.size > 1:
                noise = rng.uniform(-1, 1, array.shape) * np.abs(array).max() / 127
                tensor.CopyFrom(onnx.numpy_helper.from_array((array + noise).astype(array.dtype), tensor.name))
        onnx.save(model, noisy)
        with Session(noisy, arithmetic=Arithmetic.UNOPTIMIZED, threads=1) as session:
            got = session.run(feeds, [name])[0]
        largest = max(largest, float(np.nanmax(np.abs(_flat(got) - _flat(floats)), initial=0)))
    static = options.get("format") == "qdq-int8"  # ranges from few samples are up to twice as wide as the values seen
    factor = 24 if static else 12 if options.get("format") == "dynamic-int8" else 4
    return bool(np.nanmax(np.abs(_flat(ours) - _flat(floats)), initial=0) <= factor * largest)


def _flat(value: Any) -> npt.NDArray[Any]:
    """The elements of a tensor, or of all tensors in a list."""
    return np.concatenate([np.ravel(array) for array in (value if isinstance(value, list) else [value])])


def difference(expected: Any, got: Any, tolerance: float) -> str | None:
    """How a value of onnxruntime differs from another one, or None."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return "a sequence of another length"
        return next((d for a, b in zip(expected, got, strict=True) if (d := difference(a, b, tolerance))), None)
    if not isinstance(expected, np.ndarray):
        return None if type(expected) is type(got) else f"{type(got).__name__} instead of {type(expected).__name__}"
    if (expected.shape, expected.dtype) != (got.shape, got.dtype):
        return f"{got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
    if expected.dtype.kind not in "fc":
        wrong = float(np.mean(expected != got)) if expected.size else 0.0
        return f"{wrong:.1%} of the values differ" if wrong > 10 * tolerance else None
    return _distance(expected.astype(np.complex128 if expected.dtype.kind == "c" else np.float64), got, tolerance)


def _distance(expected: npt.NDArray[Any], got: npt.NDArray[Any], tolerance: float) -> str | None:
    finite = np.isfinite(expected)
    if np.isinf(tolerance):
        return None
    if (finite != np.isfinite(got)).any():
        return "not finite in other places"
    if not finite.any():
        return None
    size = float(np.abs(expected[finite]).max())
    error = float(np.abs(expected[finite] - got[finite]).max())
    half = 0.005 if got.dtype == np.float16 else 0.0
    return f"differs by {error:.3g} where the largest is {size:.3g}" if error > (tolerance + half) * size + 1e-3 else None


def reason_of(error: MagrError) -> str:
    """What can be counted of a message: its kind and the first words, without names."""
    text = re.sub(r"\S*judge-\S*: |'[^']*'|\d+(\.\d+)?(e[+-]?\d+)?", "", str(error).split("\n")[0])
    for cut in (
        "is not a valid ONNX model",
        "onnxruntime cannot load",
        "onnxruntime failed",
        "cannot be converted",
        "is not an ONNX model",
    ):
        if cut in text:
            text = cut
    if "InsertedPrecisionFreeCast" in str(error):
        text = "onnxruntime loses a cast of its own in a subgraph"
    if "no layer can be converted" in text:
        text = "no layer can be converted: " + text.split("): ")[-1].split(";")[0].split(" (")[0].split(": ")[-1]
    return f"{type(error).__name__}: {text[:100]}"
