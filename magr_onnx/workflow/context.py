"""What a run holds besides its model: how much memory it may use, where finished constants go, and its job directory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import onnx_ir as ir

from magr_onnx.config import schema
from magr_onnx.config.invocation import asked
from magr_onnx.errors import OptionError, OutputError
from magr_onnx.model_io.atomic import clear, workspace
from magr_onnx.model_io.files import Loaded
from magr_onnx.model_io.spill import Spool
from magr_onnx.model_io.writing import INLINE_LIMIT, Layout, explained, oversized
from magr_onnx.passes import LinearLayer, Plan
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort import custom_ops
from magr_onnx.workflow.checkpoint import JobDirectory, job_directory, manifest_of

P = ParamSpec("P")
R = TypeVar("R")
Size = int | str

DEFAULT_MEMORY = 4_000_000_000
WHOLE = 3  # times its size is what a model needs that onnxruntime holds as a whole: weights, their packed copies, activations
GRAM = 24  # bytes an element of the widest layer's Gram matrix beside that: onnxruntime's, and a sum in float64 and its mean


def with_run(function: Callable[Concatenate[Run, P], R]) -> Callable[P, R]:
    """Give a function a `Run` of its own as its first argument, which knows the others, closed when it returns."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            return function(Run(stack, asked(own, own.bind(*args, **kwargs).arguments)), *args, **kwargs)

    signature = inspect.signature(function)
    own = signature.replace(parameters=list(signature.parameters.values())[1:])
    call.__signature__ = own  # type: ignore[attr-defined]
    return call


class Run:
    """Resources of one run.

    Attributes:
        given: The arguments of the call, by name; without those that are the default.
        large: Whether the model is too large to be run as a whole in the memory there is.
        gram_budget: Bytes of Gram matrices held at a time.
        cache: Bytes of values between stages held in memory.
        layout: How the result is laid out in files.
        store: The job directory, if there is one.
        writes: Whether the result is written to a file.
        seconds: Wall time by stage, in order of first appearance.
    """

    def __init__(self, stack: contextlib.ExitStack, given: Mapping[str, Any]) -> None:
        self._stack = stack
        self.given = given
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.writes = False
        self._spool: Spool | None = None
        self.large = False
        self.gram_budget = self.cache = 0
        self.layout = Layout()
        self.store: JobDirectory | None = None

    def register(self, libraries: Sequence[str | os.PathLike[str]]) -> None:
        """Have custom operators in all sessions of the run; see `magr_onnx.runtime.ort.custom_ops.using`."""
        self._stack.enter_context(custom_ops.using(libraries))

    def open(
        self,
        loaded: Loaded,
        layers: Sequence[LinearLayer],
        output: Path | None,
        memory: Size | None,
        gram_budget: int,
        cache: int,
        shard_size: Size | None,
        external: bool,
    ) -> None:
        """Decide between ways by the size of the model, and make a place for what does not stay in memory.

        Raises:
            OptionError: A size that is none.
            OutputError: The folder of the output cannot be written to.
        """
        limit = DEFAULT_MEMORY if memory is None else schema.size("max_memory", memory)
        shard = None if shard_size is None else schema.size("shard_size", shard_size)
        widest = max((layer.k for layer in layers), default=0)
        self.large = WHOLE * loaded.bytes + GRAM * widest**2 > limit
        self.gram_budget, self.cache = (min(gram_budget, limit // 4), min(cache, limit // 8)) if self.large else (gram_budget, cache)
        self.layout = Layout(external, shard, limit // 8 if self.large else INLINE_LIMIT)
        self.writes = output is not None
        if output is None:
            if shard is not None or external:
                raise OptionError("shard_size and external_data are about files; give an output")
            return
        clear(output)
        if self.large:
            try:
                self._spool = Spool(self._stack.enter_context(workspace(output)))
            except OSError as error:
                raise OutputError(f"cannot write to {output.parent}: {explained(error)}") from error

    def resume(
        self,
        path: str | os.PathLike[str] | None,
        loaded: Loaded,
        data: Batches | None,
        plan: Plan,
        options: Mapping[str, Any],
    ) -> None:
        """Open the job directory, if one is asked for; see `magr_onnx.workflow.checkpoint.job_directory` for what may be wrong with it."""
        if path is not None:
            decided = {"large": self.large, "gram_budget": self.gram_budget}
            self.store = self._stack.enter_context(job_directory(Path(path), manifest_of(loaded, data, plan, {**options, **decided})))

    def plan(self, plan: Plan, assigned: Mapping[str, Plan]) -> None:
        """Say what will be done to the layers."""
        if self.store is not None:
            self.store.plan(plan, assigned)

    def left(self, layer: LinearLayer) -> bool:
        """Whether the layer is still to be solved."""
        return self.store is None or not self.store.has(layer)

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as that of a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def sweep(self, model: ir.Model) -> None:
        """Take what is finished out of memory."""
        if self._spool is not None:
            self._spool.sweep(model)

    def notes(self, model: ir.Model) -> list[str]:
        """What to say about it in the report of the finished ``model``."""
        found = []
        if self.store is not None and self.store.restored:
            found.append(f"{self.store.restored} layers were finished before and taken from the job directory")
        found += [] if self.store is None else self.store.notes
        if large := oversized(model, self.layout):
            found.append(f"{', '.join(large[:3])}: larger than a shard ({len(large)} tensors); each has a data file of its own")
        return found
