"""What onnxruntime and every command make of a form: ``python -m tests.forms.judge [NAME ...]`` prints a table."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import magr_onnx
from magr_onnx.errors import MagrError
from magr_onnx.runtime.ort.session import _TYPES
from tests.forms.build import FORMS, K, write

ROWS = 5
SILENT: dict[str, Any] = {"progress": False}


def feeds(session: ort.InferenceSession, rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """A feed for the inputs of a session."""
    rng = np.random.default_rng(seed)
    return {i.name: _array(i.name, i.type, i.shape, rows, rng) for i in session.get_inputs()}


def _array(name: str, kind: str, shape: Any, rows: int, rng: np.random.Generator) -> Any:
    if name == "features":
        return {f"c{i}": float(rng.standard_normal()) for i in range(0, K, 2)}
    if name == "parts":
        return [rng.standard_normal((rows, K)).astype(np.float32) for _ in range(2)]
    if name == "t" and kind == "tensor(int64)":
        return np.array([1, -1, K])
    dims = [d if isinstance(d, int) and d > 0 else rows for d in shape or ([rows, K] if name in ("x", "o") else [])]
    dtype = np.dtype(_TYPES.get(kind, "float32"))
    if dtype.kind == "O":
        return np.array([f"c{i}" for i in rng.integers(0, K, dims).reshape(-1)]).reshape(dims)
    if dtype.kind == "b":
        return np.array(rng.integers(0, 2, dims), np.bool_)
    return rng.integers(0, 8, dims).astype(dtype) if dtype.kind in "iu" else rng.standard_normal(dims).astype(dtype)


def run(path: Path, feed: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a file on a feed, by name; raises what onnxruntime raises."""
    session = session_of(path)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feed), strict=True))


def session_of(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def tensors_only(feed: Mapping[str, Any]) -> bool:
    return all(isinstance(v, np.ndarray) for v in feed.values())


def attempt(action: Callable[[], str]) -> str:
    """What came of an action: its text, ``refused: ...`` with the reason, or ``CRASH ...``."""
    try:
        return action()
    except MagrError as error:
        text = str(error).replace("\n", " ")
        return f"CRASH {text}" if "please report" in text or "Error calling" in text else f"refused: {text}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"CRASH {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})".replace("\n", " ")


def judge(name: str, folder: Path) -> dict[str, str]:
    """What onnxruntime and each command make of a form."""
    path = write(name, folder)
    verdicts: dict[str, str] = {}
    batches: list[dict[str, Any]] = []
    try:
        session = session_of(path)
        batches = [feeds(session, seed=seed) for seed in range(5)]
        outputs = session.run(None, batches[0])
        verdicts["onnxruntime"] = f"runs, {len(outputs)} outputs"
    except Exception as error:
        verdicts["onnxruntime"] = f"{'fails' if batches else 'refuses'}: {error}".replace("\n", " ")
        batches = []
    verdicts["inspect"] = attempt(lambda: f"{len(magr_onnx.inspect(path).layers)} layers")
    verdicts["verify"] = attempt(lambda: f"{len(magr_onnx.verify(path, target='x86-avx2', run=False).layers)} layers")
    out = folder / "out.onnx"
    data = batches if batches and all(map(tensors_only, batches)) else None

    def optimized(**options: Any) -> str:
        out.unlink(missing_ok=True)
        _, report = magr_onnx.optimize(path, output=out, **options, **SILENT)
        size = f"{report.bytes_after / report.bytes_before:.2f} of its size"
        text = f"{len(report.layers)} layers, {size}"
        if batches:
            if batches[0]:
                same = [i.name for i in session_of(out).get_inputs()] == [i.name for i in session_of(path).get_inputs()]
                text += "" if same else ", OTHER INPUTS"
            text += _difference(run(path, batches[0]), run(out, batches[0]))
        return text

    verdicts["data-free"] = attempt(optimized)
    if data is not None:
        for format_ in ("matmulnbits", "qdq-int8"):
            verdicts[format_] = attempt(lambda form=format_: optimized(calibration=data, format=form, validation_data=data[:2]))  # type: ignore[misc]
        if not out.exists():
            out.write_bytes(path.read_bytes())
        verdicts["validate"] = attempt(
            lambda: f"{len(next(iter(magr_onnx.validate(path, out, data[:2], **SILENT).arithmetics.values())))} outputs"
        )
    return verdicts


def _difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    if list(expected) != list(actual):
        return f", OTHER OUTPUTS {list(actual)}"
    floats = [n for n, v in expected.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    kinds = [n for n, v in expected.items() if _kind(v) != _kind(actual[n])]
    text = f", OTHER TYPES {kinds}" if kinds else ""
    if not floats:
        return text
    noise = sum(float(np.square(expected[n].astype(float) - actual[n]).sum()) for n in floats)
    signal = sum(float(np.square(expected[n].astype(float)).sum()) for n in floats)
    return f"{text}, error {np.sqrt(noise / max(signal, 1e-300)):.3f}"


def _kind(output: Any) -> Any:
    """The type of an output: of its elements, if it is an array."""
    return getattr(output, "dtype", type(output))


def main(names: list[str]) -> None:
    for name in names or FORMS:
        with tempfile.TemporaryDirectory() as folder:
            print(name)
            for command, verdict in judge(name, Path(folder)).items():
                print(f"    {command:12} {verdict[:300]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
