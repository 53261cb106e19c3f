"""onnxruntime sessions, made in one place.

Models of any size load: external data is read from its files, and tensors in memory are written to a temporary folder
(`magr_onnx.model_io.external_data`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from magr_onnx.errors import OptionError, OutputError, ProviderError, RuntimeFailure, closest, raise_all
from magr_onnx.model_io.external_data import serialized
from magr_onnx.model_io.legacy import read
from magr_onnx.model_io.validate_proto import custom_operators
from magr_onnx.model_io.writing import data_files, os_error_hint, tensor_bytes
from magr_onnx.passes.providers import CPU, PROVIDERS, Provider, find_provider

Batch = Mapping[str, npt.NDArray[Any]]
Model = ir.Model | str | os.PathLike[str]  # in memory, or a file

LIBRARIES: ContextVar[tuple[str, ...]] = ContextVar("custom operators", default=())  # shared libraries, registered in every session
LARGE_WEIGHTS = 2_000_000_000  # bytes


class Arithmetic(StrEnum):
    """Configurations in which onnxruntime computes the same file differently; see docs/decisions.md."""

    DEFAULT = "default"  # default optimization level; fused QDQ runs with int8 activations
    UNOPTIMIZED = "unoptimized"  # all graph optimizations off; every node as written
    FLOAT_QDQ = "float-qdq"  # default level, fused QDQ with float activations (session.qdq_matmulnbits_accuracy_level=0)


class Weights(StrEnum):
    """What a session keeps of a model's weights in memory."""

    AUTO = "auto"  # packed up to `LARGE_WEIGHTS`, mapped above (a file only if it is not optimized)
    PACKED = "packed"  # copies in the layouts of the kernels: fastest
    PLAIN = "plain"  # what optimizations make of them; memory of values is given back at once. Mapped above `LARGE_WEIGHTS`
    MAPPED = "mapped"  # none: they stay in their memory-mapped files, without optimizations that copy them


@contextlib.contextmanager
def custom_ops(paths: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Register shared libraries of custom operators in every session created inside the context.

    Raises:
        OptionError: A file does not exist.
    """
    libraries = [Path(p).absolute() for p in paths]
    missing = [p for p in libraries if not p.is_file()]
    raise_all(OptionError, [f"custom operators {p}: no such file; give the shared library that has them" for p in missing])
    token = LIBRARIES.set(tuple(map(str, libraries)))
    try:
        yield
    finally:
        LIBRARIES.reset(token)


def available_provider(provider: str) -> Provider:
    """Look a provider up by its registered or its onnxruntime name.

    Raises:
        ProviderError: It is not available; the message lists those that are.
    """
    raise_all(ProviderError, provider_problems(provider))
    return find_provider(provider)


def provider_problems(provider: str) -> list[str]:
    """Say that a provider is not available here, with those that are; an empty list where it is."""
    available = ort.get_available_providers()
    known = find_provider(provider)
    if known.onnxruntime in available:
        return []
    suggestion = "" if known.name in PROVIDERS else closest(provider.lower().partition("execution")[0], PROVIDERS)
    return [f"provider {provider!r} is not available; onnxruntime here has {', '.join(available)}{suggestion}"]


@dataclass(frozen=True, slots=True)
class InputInfo:
    """A model input: name, NumPy type, shape with None for dynamic dimensions; unless ``ranked``, any fits; ``axis`` is that of samples."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    ranked: bool = True
    axis: int = 0

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape) if self.ranked else "any shape"
        return f"{self.name}: {'text' if self.dtype == object else self.dtype} ({dims})"

    def fits(self, shape: Sequence[int], start: int = 0) -> bool:
        """Whether an array's shape fits, from the axis ``start`` on."""
        if not self.ranked:
            return True
        same_rank = len(shape) == len(self.shape)
        return same_rank and all(d is None or d == size for d, size in zip(self.shape[start:], shape[start:], strict=True))


_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
    **{f"tensor({'u' * u}int{b})": f"{'u' * u}int{b}" for u in (0, 1) for b in (8, 16, 32, 64)},
}


def inputs_of(model: ir.Model) -> tuple[InputInfo, ...]:
    """Return the required inputs of a model, as `Session.inputs` does, without loading it."""
    inputs = []
    values = [value for value in model.graph.inputs if str(value.name) not in model.graph.initializers]  # the others are optional
    samples = _sample_dimension(values)
    for value in values:
        try:
            dtype = np.dtype(object) if value.dtype in (None, ir.DataType.STRING) else value.dtype.numpy()
        except TypeError:
            dtype = np.dtype(object)
        names = [str(dimension) for dimension in value.shape or ()]
        axis = names.index(samples) if samples in names else 0
        inputs.append(InputInfo(str(value.name), dtype, _static_sizes(value.shape or ()), value.shape is not None, axis))
    return tuple(inputs)


def _sample_dimension(values: Iterable[ir.Value]) -> str | None:
    """Return the name of the dimension of samples: one that says batch, or the only one of first axes; None where neither is clear."""
    shapes = [[str(d) for d in value.shape or () if not isinstance(d, int) and d.value is not None] for value in values]
    named = {name for shape in shapes for name in shape if "batch" in name.lower()}
    first = {str(value.shape[0]) for value in values if value.shape and not isinstance(value.shape[0], int) and value.shape[0].value}
    return next((names.pop() for names in (named, first) if len(names) == 1), None)


def _static_sizes(shape: Iterable[object]) -> tuple[int | None, ...]:
    """Return a shape with None for its dynamic dimensions."""
    return tuple(d if isinstance(d, int) and d >= 0 else None for d in shape)


def as_floats(output: Any) -> npt.NDArray[Any] | None:
    """Return an output as an array of floats, if it is one, or a sequence of maps or of arrays of one shape; else None."""
    rows = output if isinstance(output, list) else [output]
    rows = [list(row.values()) if isinstance(row, dict) else row for row in rows]
    shapes = {np.shape(row) for row in rows}
    array = np.asarray(rows if isinstance(output, list) else rows[0]) if len(shapes) == 1 else None
    return array if array is not None and np.issubdtype(array.dtype, np.floating) else None


class Runner(Protocol):
    """What runs batches, or has run them."""

    inputs: tuple[InputInfo, ...]
    outputs: list[str]
    dimensions: dict[str, tuple[int | str, ...]]

    def run(self, feeds: Batch, outputs: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return some outputs on a batch."""


class Session:
    """An onnxruntime session on a file or an in-memory model; a context manager.

    Attributes:
        inputs: What it takes.
        outputs: Names of its outputs.
        dimensions: Declared dimensions of its inputs.
        milliseconds: What every run took, in order.
    """

    def __init__(
        self,
        model: Model,
        provider: str = "cpu",
        arithmetic: Arithmetic = Arithmetic.DEFAULT,
        threads: int = 0,
        weights: Weights = Weights.AUTO,
        spinning: bool = False,
        fuses: bool = True,
        profile: str = "",
    ) -> None:
        """Load the model.

        Args:
            model: A file, or a model in memory.
            provider: Where to run.
            arithmetic: Optimization level.
            threads: Threads per operator; 0 for one per core.
            weights: What is kept of the weights in memory.
            spinning: Let idle threads spin, as onnxruntime does by default: for measuring the latency users will see. Alongside Python
                code and other programs, it takes two thirds more processor time and is no faster.
            fuses: Let onnxruntime make integer operators of QuantizeLinear and DequantizeLinear: it rounds float weights between them.
            profile: What the path of a profile begins with (`end_profile`); empty for none.

        Raises:
            ProviderError: The provider is not available.
            RuntimeFailure: onnxruntime rejects the model; the message says why.
        """
        known = available_provider(provider)
        _preload(known)
        if weights in (Weights.AUTO, Weights.PLAIN) and _is_large(model, arithmetic):
            weights = Weights.MAPPED
        options = _options(arithmetic, threads, weights, spinning)
        if not fuses:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self._description = "the model in memory" if isinstance(model, ir.Model) else str(model)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._load(model, known.onnxruntime, options)
        self.milliseconds: list[float] = []
        self.outputs = [o.name for o in self._session.get_outputs()]
        self._overridable = {i.name for i in self._session.get_overridable_initializers()}
        declared = self._session.get_inputs()
        self.dimensions = {i.name: tuple(i.shape or ()) for i in declared}
        self.inputs = tuple(InputInfo(i.name, np.dtype(_TYPES.get(i.type, "object")), _static_sizes(i.shape or ())) for i in declared)

    def _load(self, model: Model, name: str, options: ort.SessionOptions) -> None:
        """Create the onnxruntime session; an in-memory model is written to a temporary folder first."""
        source: str | bytes = b"" if isinstance(model, ir.Model) else str(model)
        try:
            if isinstance(model, ir.Model):
                self._folder = tempfile.TemporaryDirectory(prefix="onnx-magr-")
                source, entries = serialized(model, Path(self._folder.name))
                for key, value in entries.items():
                    options.add_session_config_entry(key, value)
            self._session = ort.InferenceSession(source, options, providers=list(dict.fromkeys([name, CPU.onnxruntime])))
        except OSError as error:
            self.close()
            raise OutputError(f"cannot write temporary files to {tempfile.gettempdir()}: {os_error_hint(error)}; or set TMPDIR") from error
        except Exception as error:
            self.close()
            raise RuntimeFailure(f"onnxruntime cannot load {self._description}: {error}{_custom(model)}") from error
        if name not in self._session.get_providers():  # onnxruntime falls back to the CPU with no more than a log line
            self.close()
            raise ProviderError(f"{name} is installed but could not be started (driver or library missing?); use provider cpu")

    def run(self, feeds: Batch, outputs: Sequence[str] | None = None) -> list[npt.NDArray[Any]]:
        """Run one batch; ``feeds`` may replace initializers that are inputs of the graph too.

        Raises:
            RuntimeFailure: onnxruntime fails; the message has the input shapes.
        """
        names = {i.name for i in self.inputs} | self._overridable
        start = time.perf_counter()
        try:
            return list(self._session.run(outputs, {k: v for k, v in feeds.items() if k in names}))
        except Exception as error:
            shapes = ", ".join(f"{k} {getattr(v, 'dtype', type(v).__name__)} {getattr(v, 'shape', '')}" for k, v in feeds.items())
            raise RuntimeFailure(f"onnxruntime failed on {self._description} with inputs {shapes}: {error}") from error
        finally:
            self.milliseconds.append(1000 * (time.perf_counter() - start))

    def end_profile(self) -> list[dict[str, Any]]:
        """Return the events of a session that was given ``profile``, as onnxruntime writes them."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return events

    def close(self) -> None:
        """Release the session and its temporary files."""
        self.__dict__.pop("_session", None)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load(path: str, provider: str, weights: Weights) -> None:
    """Check that a file loads; raises as `Session` does."""
    with Session(path, provider, weights=weights):
        pass


def _is_large(model: Model, arithmetic: Arithmetic) -> bool:
    """Whether copies of the weights are to be avoided."""
    if isinstance(model, ir.Model):
        return tensor_bytes(model) > LARGE_WEIGHTS
    return arithmetic is Arithmetic.UNOPTIMIZED and sum(p.stat().st_size for p in data_files(Path(model))) > LARGE_WEIGHTS


def _options(arithmetic: Arithmetic, threads: int, weights: Weights, spinning: bool) -> ort.SessionOptions:
    """Return session options with the registered custom operators; see `Session` for the parameters."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are raised
    for library in LIBRARIES.get():
        try:
            options.register_custom_ops_library(library)
        except Exception as error:
            raise RuntimeFailure(f"{library} is not a library of custom operators for this onnxruntime: {error}") from error
    options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # which takes memory for the outputs twice over
    if arithmetic is Arithmetic.UNOPTIMIZED or weights is Weights.MAPPED:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif arithmetic is Arithmetic.FLOAT_QDQ:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if weights in (Weights.PLAIN, Weights.MAPPED):
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    return options


@functools.cache
def _preload(provider: Provider) -> None:
    """Load the shared libraries of a provider, once."""
    if provider.preload is not None:
        provider.preload(ort)


def _custom(model: Model) -> str:
    """Name the custom operators of a model that did not load, for the end of a message."""
    try:
        names = custom_operators(model if isinstance(model, ir.Model) else read(Path(model)))
    except Exception:  # the caller reports the fault of the file
        return ""
    lacking = f"; it has custom operators, which this onnxruntime lacks: {', '.join(names)} (custom_ops names libraries that have some)"
    return lacking if names else ""
