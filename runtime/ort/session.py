"""onnxruntime sessions, made in one place.

Models of any size load: what lies in files is read there, and what is in memory goes to a temporary folder
(`magr_onnx.model_io.external_data`).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from magr_onnx.errors import OutputError, ProviderError, RuntimeFailure
from magr_onnx.model_io.external_data import serialized
from magr_onnx.model_io.validate_proto import custom_operators
from magr_onnx.model_io.writing import data_files, os_error_hint, tensor_bytes
from magr_onnx.passes.providers import Provider, cpu, find_provider
from magr_onnx.runtime.ort.custom_ops import LIBRARIES

Batch = Mapping[str, npt.NDArray[Any]]

LEAN_BYTES = 2_000_000_000


class Arithmetic(StrEnum):
    """The three ways onnxruntime may compute one and the same file; see docs/decisions.md."""

    DEFAULT = "default"
    UNOPTIMIZED = "unoptimized"
    FLOAT_QDQ = "float-qdq"

    @property
    def summary(self) -> str:
        return {
            "default": "default optimization level; fused QDQ runs with int8 activations",
            "unoptimized": "all graph optimizations off; every node as written",
            "float-qdq": "default level, fused QDQ with float activations (session.qdq_matmulnbits_accuracy_level=0)",
        }[self.value]


def provider_name(provider: str) -> str:
    """The onnxruntime name of a provider that is registered, or that is called so already.

    Raises:
        ProviderError: It is not available here; the message lists those that are.
    """
    name = find_provider(provider).onnxruntime
    available = ort.get_available_providers()
    if name not in available:
        raise ProviderError(f"provider {provider!r} is not available; onnxruntime here has {', '.join(available)}")
    return name


@dataclass(frozen=True, slots=True)
class InputInfo:
    """A model input: name, NumPy type, shape with None for dynamic dimensions."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype} ({dims})"


_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
    **{f"tensor({'u' * u}int{b})": f"{'u' * u}int{b}" for u in (0, 1) for b in (8, 16, 32, 64)},
}


def inputs_of(model: ir.Model) -> tuple[InputInfo, ...]:
    """What the model has to be fed, as a session would say it, without loading one."""
    found = []
    for value in model.graph.inputs:
        if str(value.name) in model.graph.initializers:  # may be fed, need not
            continue
        try:
            dtype = np.dtype(object) if value.dtype in (None, ir.DataType.STRING) else value.dtype.numpy()
        except TypeError:
            dtype = np.dtype(object)
        shape = () if value.shape is None else tuple(d if isinstance(d, int) and d >= 0 else None for d in value.shape)
        found.append(InputInfo(str(value.name), dtype, shape))
    return tuple(found)


class Session:
    """An onnxruntime session on a file or an in-memory model; a context manager."""

    def __init__(
        self,
        model: ir.Model | str | os.PathLike[str],
        provider: str = "cpu",
        arithmetic: Arithmetic = Arithmetic.DEFAULT,
        threads: int = 0,
        lean: bool | None = None,
        spinning: bool = False,
    ) -> None:
        """Load the model.

        Args:
            model: A file, or a model in memory.
            provider: Where to run.
            arithmetic: How to optimize it.
            threads: Of one operator; 0 for all cores.
            lean: Leave weights in their memory-mapped files: no optimizations that would make copies of them, and no prepacking. None for
                where there are more than `LEAN_BYTES` of them (in a file: and it is not to be optimized).
            spinning: Let threads without work wait in a loop, as onnxruntime does by default: for measuring what users will see. Beside
                our own work in Python, and other programs, it takes two thirds more processor time and is no faster.

        Raises:
            ProviderError: The provider is not available.
            RuntimeFailure: onnxruntime rejects the model; the message says why.
        """
        name = provider_name(provider)
        _preload(find_provider(provider))
        if lean is None:
            if isinstance(model, ir.Model):
                lean = tensor_bytes(model) > LEAN_BYTES
            else:
                lean = arithmetic is Arithmetic.UNOPTIMIZED and sum(p.stat().st_size for p in data_files(Path(model))) > LEAN_BYTES
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        for library in LIBRARIES.get():
            try:
                options.register_custom_ops_library(library)
            except Exception as error:
                raise RuntimeFailure(f"{library} is no library of custom operators for this onnxruntime: {error}") from error
        options.intra_op_num_threads = threads
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if arithmetic is Arithmetic.UNOPTIMIZED or lean:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        elif arithmetic is Arithmetic.FLOAT_QDQ:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            source: str | bytes
            if isinstance(model, ir.Model):
                self._folder = tempfile.TemporaryDirectory(prefix="onnx-magr-")
                source, entries = serialized(model, Path(self._folder.name))
                for key, value in entries.items():
                    options.add_session_config_entry(key, value)
            else:
                source = str(model)
            providers = list(dict.fromkeys([name, cpu.PROVIDER.onnxruntime]))
            self._session = ort.InferenceSession(source, options, providers=providers)
        except OSError as error:
            self.close()
            raise OutputError(f"cannot write temporary files to {tempfile.gettempdir()}: {os_error_hint(error)}; or set TMPDIR") from error
        except Exception as error:
            self.close()
            raise RuntimeFailure(f"onnxruntime cannot load {_describe(model)}: {error}{_custom(model)}") from error
        if name not in self._session.get_providers():  # onnxruntime falls back to the CPU with no more than a log line
            self.close()
            raise ProviderError(f"{name} is installed but could not be started (driver or library missing?); use provider cpu")
        self._what = _describe(model)
        self.outputs = [o.name for o in self._session.get_outputs()]
        self._overridable = {i.name for i in self._session.get_overridable_initializers()}
        self.dimensions = {i.name: tuple(i.shape or ()) for i in self._session.get_inputs()}
        self.inputs = tuple(
            InputInfo(
                i.name,
                np.dtype(_TYPES.get(i.type, "object")),
                tuple(d if isinstance(d, int) and d >= 0 else None for d in self.dimensions[i.name]),
            )
            for i in self._session.get_inputs()
        )

    def run(self, feeds: Batch, outputs: Sequence[str] | None = None) -> list[npt.NDArray[Any]]:
        """Run one batch; ``feeds`` may replace initializers that are inputs of the graph too.

        Raises:
            RuntimeFailure: onnxruntime fails, with the shapes it was given.
        """
        names = {i.name for i in self.inputs} | self._overridable
        try:
            return list(self._session.run(outputs, {k: v for k, v in feeds.items() if k in names}))
        except Exception as error:
            shapes = ", ".join(f"{k} {getattr(v, 'dtype', type(v).__name__)} {getattr(v, 'shape', '')}" for k, v in feeds.items())
            raise RuntimeFailure(f"onnxruntime failed on {self._what} with inputs {shapes}: {error}") from error

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


def load(path: str, provider: str, lean: bool) -> None:
    """Load a file and let go of it; see `Session` for what may be wrong with it."""
    with Session(path, provider, lean=lean):
        pass


@functools.cache
def _preload(provider: Provider) -> None:
    """Load the libraries of a provider, once."""
    if provider.preload is not None:
        provider.preload(ort)


def _describe(model: ir.Model | str | os.PathLike[str]) -> str:
    return "the model in memory" if isinstance(model, ir.Model) else str(model)


def _custom(model: ir.Model | str | os.PathLike[str]) -> str:
    """The custom operators of a model that did not load, as the end of a message."""
    try:
        names = custom_operators(model if isinstance(model, ir.Model) else ir.load(model))
    except Exception:  # what is wrong with the file has been said
        return ""
    return (
        f"; it has custom operators, which this onnxruntime lacks: {', '.join(names)} (custom_ops names libraries that have some)"
        if names
        else ""
    )
