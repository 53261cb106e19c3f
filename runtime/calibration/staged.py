"""Calibration in stages with error feedback: each stage's layers see the quantized layers before them.

The float model and the model being quantized run side by side, segment by segment (`magr_onnx.passes.instrument.segments`), each on its
own live values. What a stage's layers read is ``X`` in one and ``X_q`` in the other; second moments of both, and between them, are what the
quantizers need to compute ``X W0`` from ``X_q``. Every segment runs once in each model: two forward passes over the data in all, however
many stages there are.

Without error feedback the float model runs alone, in the same way: a session then holds the weights of one segment, so that models are
calibrated that are larger than memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.activation_ranges import rounded
from magr_onnx.core.error_feedback import goal_of
from magr_onnx.core.types import LARGE, LARGE_ROWS, Activation, Goal, LayerStats, gram_type
from magr_onnx.errors import NonFiniteError, OutputError, raise_all
from magr_onnx.model_io.writing import explained
from magr_onnx.passes.graph.kv_cache import current_mask
from magr_onnx.passes.instrument.segments import behind, beside, cut, given_inputs, plan
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.moments import HELD_OUT, Calibration, check_rows, not_finite, readers_of
from magr_onnx.runtime.calibration.moments import plan as plan_groups
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Session

DEFAULT_CACHE = 2 << 30

Tensor = npt.NDArray[Any]
Progress = Callable[[int, int], None]


class Cache:
    """Live values of all batches: in memory up to a number of bytes, the rest in files of a temporary folder."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._files: dict[tuple[str, int], Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0  # names files: their number would give a name again once some were dropped
        self.spilled = 0

    def put(self, name: str, batch: int, array: Tensor) -> None:
        if self._used + array.nbytes <= self._limit:
            self._memory[name, batch] = array
            self._used += array.nbytes
            return
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="onnx-magr-")
            path = Path(self._folder.name, f"{self._written}.npy")
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            where = tempfile.gettempdir()
            raise OutputError(
                f"cannot write values between stages to {where}: {explained(error)}; or give a larger --cache, or set TMPDIR"
            ) from error
        self._files[name, batch] = path
        self._written += 1
        self.spilled += array.nbytes

    def get(self, name: str, batch: int) -> Tensor:
        if (name, batch) in self._memory:
            return self._memory[name, batch]
        loaded: Tensor = np.load(self._files[name, batch], allow_pickle=False)
        return loaded

    def drop(self, name: str, batch: int) -> None:
        if (name, batch) in self._memory:
            self._used -= self._memory.pop((name, batch)).nbytes
        else:
            self._files.pop((name, batch)).unlink()

    def keep(self, names: Sequence[str]) -> None:
        """Drop everything but these values."""
        for name, batch in [*self._memory, *self._files]:
            if name not in names:
                self.drop(name, batch)

    def run(
        self,
        model: ir.Model,
        given: Sequence[str],
        wanted: Sequence[str],
        batches: int,
        provider: str,
        fallback: Cache | None = None,
        shared: frozenset[str] | set[str] = frozenset(),
    ) -> None:
        """Compute ``wanted`` from ``given`` over all batches; ``shared`` values come from ``fallback``."""

        def fetch(name: str, batch: int) -> Tensor:
            return fallback.get(name, batch) if fallback is not None and name in shared else self.get(name, batch)

        if not wanted:  # the layers read the model's inputs
            return
        segment = cut(model, {n: fetch(n, 0) for n in given}, wanted)
        with Session(segment, provider) as session:
            needed = [i.name for i in session.inputs]
            for b in range(batches):
                for name, array in zip(wanted, session.run({n: fetch(n, b) for n in needed}, list(wanted)), strict=True):
                    self.put(name, b, array)

    def names(self, batch: int) -> list[str]:
        return [n for n, b in (*self._memory, *self._files) if b == batch]

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()


class _Inputs:
    """Sums over rows of one value: in the model being quantized, and (``pair``) between it and the float one."""

    def __init__(self, width: int, pair: bool) -> None:
        self.gram: Tensor = np.zeros((width, width))
        self.mean, self.float_mean, self.rows = np.zeros(width), np.zeros(width), 0
        self.cross, self.float_gram = (np.zeros((width, width)) if pair else None for _ in range(2))

    def add(self, x: Tensor, quantized: Tensor) -> None:
        step = LARGE_ROWS if len(self.mean) >= LARGE else len(self.mean)
        for at in range(0, len(self.mean), step):  # of a large matrix no second one is made
            self.gram[at : at + step] += quantized[:, at : at + step].T @ quantized
        self.mean += quantized.sum(axis=0, dtype=np.float64)
        self.float_mean += x.sum(axis=0, dtype=np.float64)
        self.rows += len(x)
        if self.cross is not None and self.float_gram is not None:
            self.cross += quantized.T @ x
            self.float_gram += x.T @ x

    def stats(self, activation: Activation | None) -> LayerStats:
        n = max(self.rows, 1)
        gram, self.gram = self.gram, np.zeros((0, 0))
        gram /= n
        gram = gram.astype(gram_type(len(self.mean)), copy=False)
        return LayerStats(gram, self.mean / n, self.rows, self.float_mean / n, activation)

    def goal(self, weights: Tensor) -> Goal:
        assert self.cross is not None
        assert self.float_gram is not None
        n = max(self.rows, 1)
        return goal_of(weights, self.cross / n, self.float_gram / n, self.float_mean / n, self.rows)


class _Sums:
    """Sums over rows of what one layer should put out so that the sum with the value beside it is right."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.cross, self.mean, self.power, self.rows = np.zeros(weights.shape), *np.zeros((2, weights.shape[1])), 0

    def add(self, x: Tensor, quantized: Tensor, missing: Tensor) -> None:
        y = x @ self.weights
        y += missing
        self.cross += quantized.T @ y
        self.mean += y.sum(axis=0, dtype=np.float64)
        self.power += np.einsum("nk,nk->k", y, y, dtype=np.float64)
        self.rows += len(x)

    def goal(self) -> Goal:
        n = max(self.rows, 1)
        return Goal(self.cross / n, self.mean / n, self.power / n, self.rows)


def staged(
    original: ir.Model,
    work: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches,
    *,
    mask: str | None = None,
    provider: str = "cpu",
    quantize: Mapping[str, Activation] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    cache: int = DEFAULT_CACHE,
    changed: Collection[str] = (),
    progress: Progress | None = None,
    feedback: bool = True,
    hold_out: bool = True,
    gram_budget: int | None = None,
    wanted: Callable[[LinearLayer], bool] = lambda layer: True,
    cuts: Sequence[LinearLayer] | None = None,
) -> Iterator[tuple[Sequence[LinearLayer], Calibration]]:
    """Stages of layers, each with the statistics of what its layers read.

    The caller quantizes a stage's layers in ``work`` before it asks for the next one, and lets go of the statistics.

    Args:
        original: The float model.
        work: The model being quantized, a copy of ``original`` so far but for what makes the ``changed`` values.
        layers: Its layers.
        data: Batches that fit both.
        mask: Input whose zero elements mark rows to leave out, wherever it has one element a row.
        provider: Where to run.
        quantize: How layer inputs will be quantized, by value name.
        bounds: What values are clipped to first, by value name.
        cache: Bytes of live values to hold in memory; more go to a temporary folder.
        changed: Values of ``work`` that differ from the float ones already, by name: convolutions, and layers that belong to no
            stage, are quantized first.
        progress: Called with segments of batches done and in total.
        feedback: Whether ``work`` runs beside the float model; else layers see float inputs and have no goals.
        hold_out: Whether every `HELD_OUT`-th batch is kept apart; with feedback it always is.
        gram_budget: Bytes of Gram matrices held at a time, one at least; a stage that has more comes in parts. None for no bound.
        wanted: Layers that statistics are for; parts without one come without.
        cuts: Layers to cut the model at, those of ``layers`` among them, so that no segment has many; None for ``layers`` alone.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """
    quantize, bounds = quantize or {}, bounds or {}
    steps = plan(work, layers if cuts is None else cuts)
    own = {id(layer.node): layer for layer in layers}
    moved = behind(work, changed)
    known = {str(v.name) for v in original.graph.inputs} | {str(v.name) for node in original.graph for v in node.outputs}
    kept = [[n for n in live if n in known] for live in steps.live]  # not weights that only ``work`` dequantizes: they are made again
    with Cache(cache // 2) as floats, Cache(cache // 2) as quants:
        masks = _begin(original, data, mask, floats)
        shared: set[str] = set(floats.names(0))  # the same in both models: nothing before them is quantized
        for s, (stage, live) in enumerate(zip(steps.stages, kept, strict=True)):
            before = floats.names(0)
            new = [n for n in live if n not in before]
            floats.run(original, before, new, len(data), provider)
            if not feedback:
                shared |= set(new)
            elif s == 0:
                shared |= set(new) - moved
            if feedback:
                quants.run(work, before, [n for n in new if n not in shared], len(data), provider, fallback=floats, shared=shared)
            if progress is not None:
                progress(s + 1, len(steps.stages))
            mine = tuple(own[id(layer.node)] for layer in stage if id(layer.node) in own)
            for part in [mine] if gram_budget is None else plan_groups(mine, gram_budget, hold_out):
                left = part if any(map(wanted, part)) else []  # all of them: layers that share a weight are solved together
                found = _gather(left, floats, quants, shared, live, masks, data, quantize, bounds, mask, feedback, hold_out)
                yield part, replace(found, spilled=floats.spilled + quants.spilled)
                del found  # before the next ones are made
            floats.keep(live)
            quants.keep(live)


def _gather(
    stage: Sequence[LinearLayer],
    floats: Cache,
    quants: Cache,
    shared: set[str],
    live: Sequence[str],
    masks: Sequence[Tensor | None],
    data: Batches,
    quantize: Mapping[str, Activation],
    bounds: Mapping[str, tuple[float, float]],
    mask: str | None,
    feedback: bool,
    hold_out: bool,
) -> Calibration:
    """Statistics of what a stage reads and (with feedback) should put out, every `HELD_OUT`-th batch apart if wanted."""
    hold_out |= feedback
    stats: dict[str, LayerStats] = {}
    goals: dict[str, Goal] = {}
    bad: list[str] = []
    unmasked: list[str] = []
    for name, readers in readers_of(stage).items():
        activation = quantize.get(name)
        same = name in shared and (activation is None or not feedback)
        besides = {layer.name: _beside(layer, name, live, shared, floats) for layer in readers}
        sums = {layer.name: [_Sums(layer.read()) for _ in range(2)] for layer in readers if besides[layer.name] is not None}
        inputs = [_Inputs(readers[0].k, pair=not same and len(sums) < len(readers)) for _ in range(1 + hold_out)]
        for b in range(len(data)):
            x = floats.get(name, b)
            y = x if name in shared else quants.get(name, b)
            if name in bounds:
                x, y = np.clip(x, *bounds[name]), np.clip(y, *bounds[name])
            y = rounded(y, activation)
            keep = _counted(x, masks[b])
            part = hold_out and b % HELD_OUT == HELD_OUT - 1
            rows = _rows(x, keep), _rows(y, keep)
            inputs[part].add(*rows)
            for layer, both in sums.items():
                other = str(besides[layer])
                both[part].add(*rows, _rows(floats.get(other, b) - quants.get(other, b), keep))
            if b == 0 and keep is None and mask is not None:
                unmasked.append(name)
        kept, *rest = (i.stats(activation) for i in inputs)
        held = rest[0] if hold_out else None
        whole = kept if held is None else kept.combine(held)
        if not (np.isfinite(whole.target_mean).all() and np.isfinite(whole.gram).all()):
            bad.append(not_finite(name, readers, data.describe))
        if mask is not None:
            check_rows([whole.rows], mask)
        parted = held is not None and kept.rows > 0 and held.rows > 0
        if whole.rows:
            stats[name] = replace(whole, held_out=held) if parted else whole
        for reader in readers if parted and not same else ():
            parts = [s.goal() for s in sums[reader.name]] if reader.name in sums else [i.goal(reader.read()) for i in inputs]
            goals[reader.name] = replace(parts[0].combine(parts[1]), held_out=parts[1])
    raise_all(NonFiniteError, bad)
    return Calibration(stats, tuple(unmasked), goals)


def _beside(layer: LinearLayer, name: str, live: Sequence[str], shared: set[str], floats: Cache) -> str | None:
    """The value added to the layer's output, if both models have it by now, it differs between them, and its rows are those read."""
    other = beside(layer)
    if other is None or other not in live or other in shared:
        return None
    return other if floats.get(other, 0).shape == (*floats.get(name, 0).shape[:-1], layer.n) else None


def _begin(model: ir.Model, data: Batches, mask: str | None, cache: Cache) -> list[Tensor | None]:
    masks: list[Tensor | None] = []
    names = given_inputs(model)
    for b, batch in enumerate(data):
        masks.append(None if mask is None else current_mask(batch, mask))
        for name in names:
            cache.put(name, b, np.asarray(batch[name]))
    return masks


def _counted(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The rows of ``x`` that count, ``(n,)`` booleans; None for all."""
    return mask.reshape(-1) if mask is not None and mask.shape == x.shape[:-1] else None


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return (flat if keep is None else flat[keep]).astype(np.float32, copy=False)
