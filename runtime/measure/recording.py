"""Large models one after the other: what the first puts out is kept until the second has run on the same batches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.model_io.files import model_bytes
from magr_onnx.model_io.legacy import read
from magr_onnx.model_io.writing import data_files
from magr_onnx.passes.graph.kv_cache import pairs
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.sources import Batches, Steps, with_progress
from magr_onnx.runtime.ort.session import Arithmetic, Batch, Model, Runner, Session

LARGE = 1 << 30  # bytes of two models together, from which one is loaded at a time
IN_MEMORY = 64 << 20  # bytes of outputs; the rest is written to a temporary folder


def bytes_of(model: Model) -> int:
    """Return the size of a model in memory as a file, or of a file and its data."""
    if isinstance(model, ir.Model):
        return model_bytes(model)
    return sum(path.stat().st_size for path in (Path(model), *data_files(Path(model))))


def are_large(*sizes: int) -> bool:
    """Return whether models of so many bytes take so much memory that one is loaded at a time."""
    return sum(sizes) >= LARGE


def output_names(model: Model) -> list[str]:
    """Return the names of a model's outputs."""
    graph = (model if isinstance(model, ir.Model) else read(Path(model))).graph
    return [str(value.name) for value in graph.outputs]


def open_alone(model: Model, provider: str, arithmetic: Arithmetic = Arithmetic.DEFAULT, **options: Any) -> Session:
    """Open a session on a large model once what is left of others is gone: graphs are cycles of references, which keep their tensors."""
    gc.collect()
    return Session(model, provider, arithmetic, **options)


@contextlib.contextmanager
def first_of_two(model: Model, provider: str, data: Batches, large: bool) -> Iterator[Runner]:
    """Open the model that another is compared with on all batches of the data: where they are ``large``, its recording."""
    with contextlib.ExitStack() as stack:
        if not large:
            yield stack.enter_context(Session(model, provider))
            return
        with open_alone(model, provider) as session:
            recording = stack.enter_context(Recording(session, data, session.outputs))
        gc.collect()
        yield recording


class Recording:
    """The outputs of a session on some batches, in whose place it stands for a model that reads the same batches in the same order.

    A context manager. Outputs that are the past of a next step are left out where there are others.

    Attributes:
        inputs: Inputs of the session.
        outputs: Names of its outputs.
        dimensions: Declared dimensions of its inputs.
    """

    def __init__(self, session: Session, data: Batches, wanted: Collection[str], progress: Steps | None = None) -> None:
        """Run the session on all batches, and keep those of its outputs that are ``wanted``.

        Raises:
            RuntimeFailure: The model does not run.
            OutputError: The temporary folder cannot be written to.
        """
        self.inputs, self.outputs, self.dimensions = session.inputs, session.outputs, session.dimensions
        presents = set(pairs((i.name for i in session.inputs), session.outputs).values())
        names = [name for name in session.outputs if name in wanted]
        names = [name for name in names if name not in presents] or names
        self._cache = Cache(IN_MEMORY, "outputs of the float model", "set TMPDIR")
        self._lists: dict[tuple[str, int], Any] = {}  # sequences and maps, which are small
        self._position = 0
        for index, batch in with_progress(data, progress):
            for name, value in zip(names, session.run(batch, names) if names else [], strict=True):
                if isinstance(value, np.ndarray):
                    self._cache.put(name, index, value)
                else:
                    self._lists[name, index] = value
        self._count = len(data)

    def run(self, feeds: Batch, outputs: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the outputs on the next batch; after the last comes the first again."""
        del feeds
        index, self._position = self._position, (self._position + 1) % self._count
        return [self._lists[name, index] if (name, index) in self._lists else self._cache.get(name, index) for name in outputs]

    def __enter__(self) -> Self:
        self._cache.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cache.__exit__(kind, error, trace)
