"""Second moments of what every expert of a mixture reads: of the tokens that the router sends to it, and of their hidden units.

onnxruntime computes the inputs and scores of a MoE, in stages as for error feedback (`magr_onnx.runtime.calibration.staged`). Who sees a
token, and the first layer of an expert, are computed here as its kernel does (`magr_onnx.core.experts`). A mask leaves out tokens in
batches that have one for each of its elements.

An expert that few tokens come to (fewer than `FEW`) also takes those that came nearest to it: in every batch its share of `FEW`, by the
score that they lack, with a weight of `JOINING`. They are inputs of the same layer, and mostly more like its own than what is assumed
without data: with up to three tokens of its own, an expert is 2 to 3 dB better for it on inputs of one kind, and 0.6 to 0.9 dB where every
expert has a kind of its own (``tests/benchmarks/experts.py``: random experts, 4 bits).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core import threads
from magr_onnx.core.backends import Backend
from magr_onnx.core.experts import nearest, route
from magr_onnx.core.gram import LEAST_WIDTH
from magr_onnx.core.moments import MomentAccumulator, split_stats
from magr_onnx.core.types import Array, LayerStats
from magr_onnx.errors import ModelError, NonFiniteError, listed, raise_all
from magr_onnx.passes.instrument.segments import non_tensors, segments_of
from magr_onnx.passes.layers.experts import ExpertLayer, to_matrix
from magr_onnx.passes.layers.weighted import WeightedNode
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.staged import Values, lives_of
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.hold_out import HoldOut, Parts
from magr_onnx.runtime.data.sources import Batches, Steps

FEW = 64
"""Tokens of an expert below which others join them."""
JOINING = 0.25
"""What a token that joins an expert counts, of one that goes to it: inputs of experts may be of very different kinds."""

Truth = npt.NDArray[np.bool_]
Stats = tuple[LayerStats | None, LayerStats | None]
"""Second moments of what both layers of an expert read; None without tokens."""


def staged_tokens(
    model: ir.Model,
    layers: Sequence[ExpertLayer],
    cuts: Sequence[WeightedNode],
    context: CalibrationContext,
    cache: int,
    progress: Steps,
) -> Generator[Tokens]:
    """Run a model in stages, and yield what each layer reads, in the order of stages; it is there until the next one is asked for.

    Args:
        model: The float model.
        layers: Its mixtures of experts, in the main graph.
        cuts: More layers to cut the model at, so that it is never in memory as a whole; no routers.
        context: Data, mask and provider.
        cache: Bytes of values between stages held in memory.
        progress: Told of every stage.

    Raises:
        ModelError: Values between stages are no tensors.
    """
    mixtures = {id(layer): layer for layer in layers}
    steps = segments_of(model, [*layers, *cuts])
    if containers := non_tensors(model, steps):
        raise ModelError(f"{listed(containers)} between stages is no tensor")
    with Cache(cache) as floats, Cache(0) as unused:
        values = Values(model, model, context, floats, unused, ())
        for s, (stage, live) in enumerate(zip(steps.stages, lives_of(model, steps), strict=True)):
            values.advance(live, feedback=False, first=s == 0)
            for layer in stage:
                if id(layer) in mixtures:
                    yield Tokens(mixtures[id(layer)], values, context.data, context.backend)
            values.keep(live)
            progress(s + 1, len(steps.stages))


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What one mixture of experts reads.

    Attributes:
        layer: The mixture.
        values: Its inputs and scores, in all batches.
        data: The batches.
        backend: Where experts are solved.
    """

    layer: ExpertLayer
    values: Values
    data: Batches
    backend: Backend

    def counts(self) -> npt.NDArray[np.intp]:
        """Count the tokens that go to every expert, ``(E,)``.

        Raises:
            NonFiniteError: Inputs or scores are NaN or infinite.
        """
        found = np.zeros(self.layer.experts, np.intp)
        bad: list[str] = []
        for batch in self._batches():
            if not (np.isfinite(batch.rows[batch.kept]).all() and np.isfinite(batch.scores[batch.kept]).all()):
                where = self.data.label(batch.index)
                bad.append(f"input or scores of {self.layer.name} ({self.layer.x.name}): NaN or infinite activations in {where}")
            found += batch.seen.sum(axis=0)
        raise_all(NonFiniteError, bad[:1])
        return found

    def moments(self, experts: Sequence[int], counts: npt.NDArray[np.intp]) -> list[Stats]:
        """Return the second moments of what both layers of some ``experts`` read; ``counts (E,)`` are the tokens that go to each."""
        first, biases = self.layer.stacks()[0], self.layer.read_biases()[0]
        found = [
            _Expert(
                self.layer,
                number,
                to_matrix(first[number]),
                None if biases is None else biases[number].astype(np.float32),
                bool(counts[number] < FEW),
                self._sums(),
            )
            for number in experts
        ]
        for batch in self._batches():
            threads.each(partial(_Expert.take, batch=batch), found)
        return [expert.stats() for expert in found]

    def _sums(self) -> tuple[Parts[MomentAccumulator], Parts[MomentAccumulator]]:
        """Start the sums of what both layers of an expert read."""
        hold_out, sums = HoldOut.of(self.data.samples), partial(MomentAccumulator, backend=self.backend)
        first, second = (Parts(hold_out, width, partial(sums, width, few=width >= LEAST_WIDTH)) for width, _ in self.layer.shapes)
        return first, second

    def _batches(self) -> Iterator[_Batch]:
        """Yield what was read in every batch."""
        for index in range(len(self.values)):
            scores, rows = (
                self.values.floats.get(str(value.name), index).reshape(-1, width).astype(np.float32, copy=False)
                for value, width in ((self.layer.router, self.layer.experts), (self.layer.x, self.layer.k))
            )
            mask = self.values.masks[index]
            kept = mask.reshape(-1) if mask is not None and mask.size == len(rows) else np.ones(len(rows), np.bool_)
            seen = route(scores, self.layer.form.k) & kept[:, None]
            yield _Batch(index, self.data.weight(index), rows, scores, kept, seen, -(-FEW // len(self.data)))


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """What a mixture read in one batch.

    Attributes:
        index: Its number.
        weight: The factor of sums over it.
        rows: Inputs ``(n, H)`` float32.
        scores: Scores ``(n, E)`` float32.
        kept: Which tokens count, ``(n,)``.
        seen: Which tokens that count go to which experts, ``(n, E)``.
        share: Tokens that an expert with few of them takes at least.
    """

    index: int
    weight: float
    rows: Array
    scores: Array
    kept: Truth
    seen: Truth
    share: int


@dataclass(frozen=True, slots=True, eq=False)
class _Expert:
    """The sums of one expert.

    Attributes:
        layer: Its mixture.
        number: Its number.
        weight: Its first matrix ``(H, F)``.
        bias: The bias of that ``(F,)``; None for none.
        joined: Whether tokens that come nearest join its own.
        sums: Of the inputs, and of the hidden units.
    """

    layer: ExpertLayer
    number: int
    weight: Array
    bias: Array | None
    joined: bool
    sums: tuple[Parts[MomentAccumulator], Parts[MomentAccumulator]]

    def take(self, batch: _Batch) -> None:
        """Add the tokens of a batch that go to the expert and, where they are few, those that come nearest."""
        own = batch.seen[:, self.number]
        self.add(batch.index, batch.rows[own], batch.weight)
        if self.joined:
            others = nearest(batch.scores, self.layer.form.k, self.number, batch.kept & ~own, batch.share - int(own.sum()))
            self.add(batch.index, batch.rows[others], batch.weight * JOINING)

    def add(self, batch: int, rows: Array, weight: float) -> None:
        """Add tokens ``(n, H)``."""
        if not len(rows):
            return
        values = rows @ self.weight
        hidden = self.layer.form.between(values if self.bias is None else values + self.bias)
        for parts, added in zip(self.sums, (rows, hidden), strict=True):
            parts.of(batch).add_rows(added, added, weight)

    def stats(self) -> Stats:
        """Return the moments of inputs and of hidden units; None without tokens. Consumes the sums."""
        first, second = (split_stats(parts.sums, parts.folds, None) for parts in self.sums)
        return first, second
