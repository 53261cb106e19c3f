"""What the steps of one run share: where they run, in how much memory, who is told, and where finished layers are kept."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from magr_onnx.config.arguments import OnLayer, Progress
from magr_onnx.core.backends import HOST, Backend
from magr_onnx.model_io.atomic import remove_stale, staging_directory
from magr_onnx.model_io.spill import Spool
from magr_onnx.model_io.writing import INLINE_LIMIT, Layout, output_errors, oversized
from magr_onnx.passes import LinearLayer
from magr_onnx.passes.layers.recurrent import GATES
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.runtime.data.sources import Steps
from magr_onnx.workflow.checkpoint import JobDirectory
from magr_onnx.workflow.cluster import Cluster
from magr_onnx.workflow.request import OptimizeRequest

T = TypeVar("T")
DEFAULT_MEMORY = 4_000_000_000
WHOLE = 3  # times its size is what a model needs that onnxruntime holds as a whole: weights, their packed copies, activations
GRAM = 24  # bytes an element of the widest layer's Gram matrix beside that: onnxruntime's, and a sum in float64 and its mean


@dataclass(frozen=True, slots=True)
class Memory:
    """How much memory a run may use.

    Attributes:
        large: Whether the model is too large to be run as a whole in the memory there is.
        gram_budget: Bytes of Gram matrices held at a time.
        cache: Bytes of values between stages held in memory.
        layout: How the result is laid out in files.
        asked: The limit that was asked for, bytes; None for the usual one, which running a model as a whole may exceed.
    """

    large: bool
    gram_budget: int
    cache: int
    layout: Layout
    asked: int | None = None

    @property
    def limit(self) -> int:
        """Return the bytes that a run may use: those asked for, or the usual ones."""
        return _limit(self.asked)

    @staticmethod
    def of(request: OptimizeRequest, model_bytes: int, widest: int) -> Memory:
        """Decide by the size of the model and of its ``widest`` Gram matrix."""
        limit, asked = _limit(request.max_memory), request.max_memory
        if WHOLE * model_bytes + GRAM * widest**2 <= limit:
            layout = Layout(request.external_data, request.shard_size, INLINE_LIMIT)
            return Memory(False, request.gram_budget, request.cache, layout, asked)
        layout = Layout(request.external_data, request.shard_size, limit // 8)
        return Memory(True, min(request.gram_budget, limit // 4), min(request.cache, limit // 8), layout, asked)


def _limit(asked: int | None) -> int:
    return DEFAULT_MEMORY if asked is None else asked


class Stopwatch:
    """Wall time by stage.

    Attributes:
        seconds: By name of the stage, in order of first appearance.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as that of a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True, slots=True, eq=False)
class RunContext:
    """What the steps of one run share.

    Attributes:
        provider: Where to run.
        selection: The layers to convert.
        mask: The input that marks rows to count, if there is one.
        memory: How much memory the run may use.
        progress: Called during long work, with the stage.
        on_layer: Called with every finished layer.
        spool: Where finished constants of a large model go.
        store: The job directory, if there is one.
        workers: Where layers are solved; None for this process.
        backend: Where layers are solved.
        stopwatch: Wall time by stage.
        known: What was measured of the float model, while a search makes several models of it; None where only one is made.
        fits_weights: Whether data are for weights, too; if not, for ranges of activations alone, of a model that has been rewritten.
    """

    provider: str
    selection: Selection
    mask: str | None
    memory: Memory
    progress: Progress
    on_layer: OnLayer | None
    spool: Spool | None = None
    store: JobDirectory | None = None
    workers: Cluster | None = None
    backend: Backend = HOST
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    known: dict[Hashable, Any] | None = None
    fits_weights: bool = True

    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        """Measure what does not depend on what a search tries; return what was measured before, where that is kept."""
        if self.known is None:
            return measure()
        if key not in self.known:
            self.known[key] = measure()
        known: T = self.known[key]
        return known

    def stage(self, name: str) -> Steps:
        """The progress of one stage."""
        return functools.partial(self.progress, name)

    def report_layers(self, rows: Iterable[LayerRow]) -> None:
        """Tell the caller of finished layers."""
        if self.on_layer is not None:
            for row in rows:
                self.on_layer(row)

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as that of a stage."""
        self.stopwatch.lap(stage)

    def spill(self, model: ir.Model) -> None:
        """Take what is finished out of memory, where the model is large."""
        if self.spool is not None:
            self.spool.spill(model)

    def is_unsolved(self, layer: LinearLayer) -> bool:
        """Whether the job directory does not have the layer."""
        return self.store is None or not self.store.has(layer)

    def device_notes(self, rows: Iterable[LayerRow]) -> list[str]:
        """What to say of the device that was asked for: what was solved there, and what was not."""
        if self.backend is HOST:
            return []
        where = f"device {self.backend.name} ({self.backend.described})"
        if any(row.rows for row in rows if row.op not in (*GATES, "Conv")):
            others = "layers without data, convolutions, recurrent operators and tables of embeddings"
            return [f"linear layers were solved on {where}, unless their rows say otherwise; {others} on the CPU"]
        return [f"nothing was solved on {where}: only linear layers with calibration data are; all others are solved on the CPU"]

    def notes(self, model: ir.Model) -> list[str]:
        """What to say about files in the report of the finished ``model``."""
        notes = [] if self.workers is None else [*self.workers.notes]
        if self.store is not None:
            count = self.store.restored
            notes += [f"{count} layers were finished before and taken from the job directory"] * (count > 0) + self.store.notes
        if large := oversized(model, self.memory.layout):
            notes.append(f"{', '.join(large[:3])}: larger than a shard ({len(large)} tensors); each has a data file of its own")
        return notes


def open_spool(output: Path | None, large: bool, stack: contextlib.ExitStack) -> Spool | None:
    """Remove what dead runs left beside the output, and make a folder for what a large model has no memory for; None for none.

    Raises:
        OutputError: The folder of the output cannot be written to.
    """
    if output is not None:
        remove_stale(output)
    if output is None or not large:
        return None
    with output_errors(f"cannot write to {output.parent}"):
        return Spool(stack.enter_context(staging_directory(output)))
