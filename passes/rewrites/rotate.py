"""Rotations of the residual stream, folded into the weights: rounding errors fall with the ranges of what is rounded, at no cost at
inference.

For an orthogonal ``Q (K, K)``, a transformer computes the same function if everything that writes to its residual stream is multiplied by
Q, and everything that reads it by ``Q^T``: ``(x Q) (Q^T W) = x W``, and norms see vectors of the same length (QuaRot, Ashkboos et al.,
arXiv 2404.00456, R1). `magr_onnx.passes.rewrites.stream` finds the streams of a graph.

1. The gain of a norm does not commute with Q, and is folded into the layers behind it: ones take its place, so that onnxruntime fuses what
   it fused before. A shift is folded into their biases where all of them have one; else it stays, as ``(shift / gain) Q``, so that no node
   is added.
2. LayerNormalization stays what it is, with a Q that keeps the vector of ones: ``1 Q = 1`` and ``Q 1 = 1``, so subtraction of the mean
   commutes with Q. QuaRot makes RMS norms of them instead (by centring the writers), which are other operators.
3. Q is a randomized Hadamard matrix (`magr_onnx.core.rotation`), from which a descent on the ranges of the weights starts
   (`magr_onnx.core.rotation_descent`), in the place of SpinQuant's training (Liu et al., arXiv 2405.16406).
4. The rotated model is run beside the other, and refused if outputs differ by more than `TOLERANCE`.
5. Nothing is stored twice. A table of embeddings that is the head's weight, too, cannot take up the last norm's gain: a product with
   ``Q^T diag(gain) Q`` comes before the head, which costs K^2 multiplications a row, where the head has as many times K as it has rows.
   This product stays float, since a coarse grid over its diagonal would lose all else.

Then the values of every attention are rotated head by head (QuaRot's R2; `magr_onnx.passes.rewrites.heads`), chosen likewise, from the
better of the identity and a Hadamard matrix: a rotation of the stream may have shaped these columns already. QuaRot's other rotations, of
keys and of the inner activations of the feed-forward network, would cost at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.quantizers import rtn
from magr_onnx.core.rotation import Rotation, random_rotation
from magr_onnx.core.rotation_descent import Turned, descend, gradient
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.errors import listed
from magr_onnx.passes.graph.constants import replace_input
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.subgraphs import graph_of
from magr_onnx.passes.layer_state import forget
from magr_onnx.passes.layers.linear import KEPT_FLOAT, LinearLayer, view
from magr_onnx.passes.layers.weighted import FLOATS
from magr_onnx.passes.rewrites.base import Context, Rewrite, remember
from magr_onnx.passes.rewrites.heads import Heads, find_heads
from magr_onnx.passes.rewrites.stream import Gained, Slot, Stream, find_streams
from magr_onnx.report.reasons import Reason

TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 1e-2}
"""Relative difference of the outputs up to which a rotated model of these weights is taken for the same."""

MOST_WEIGHTS = 1 << 24  # that a rotation is chosen by; of narrow streams

LEAST_GAIN = 1e-3  # of the largest: a shift is divided by gains above it only


def rotate(stream: Stream, rotation: Rotation, written: Callable[[], None] = lambda: None) -> None:
    """Fold a rotation of a stream into everything that reads it and writes it; ``written`` is called after every layer."""
    shifts = _shifts(stream)
    folded = {slot for slot, readers in shifts.items() if _folds(readers)}
    for layer, gained in stream.readers.values():
        current = _again(layer)
        weight = current.read()
        bias: Array | None = None
        if gained is not None and gained.shift in folded:
            before = current.read_bias()
            bias = gained.shift.read() @ weight + (0 if before is None else before)
        remember(current)
        if id(layer.node) in stream.tied:
            if gained is not None:
                _insert_gain(current, rotation.of_columns(rotation.of_rows(np.diag(_gain(gained)))))
            current.write(None, bias)
        else:
            current.write(rotation.of_columns(_behind_gain(weight, gained)).astype(np.float32), bias)
        written()
    for layer in stream.writers.values():
        current = _again(layer)
        bias = current.read_bias()
        remember(current)
        current.write(rotation.of_rows(current.read()).astype(np.float32), None if bias is None else rotation.of_rows(bias))
        written()
    for slot, readers in shifts.items():
        slot.write(np.zeros(stream.width) if slot in folded else rotation.of_rows(slot.read() / _gain(readers[0][1])))
    for slot in {slot for _, gained in stream.readers.values() if gained is not None for slot in gained.scales}:
        slot.write(np.ones(stream.width))
    _rotate_constants(stream, rotation)


def _insert_gain(layer: LinearLayer, gain: Array) -> None:
    """Multiply what a layer reads by a matrix ``(K, K)``, in a product that stays float."""
    x, weight = layer.x, layer.constant("_gain", gain.astype(FLOATS[layer.dtype]))
    product = ir.node("MatMul", [x, weight], name=layer.names.node(f"{layer.name}_gain"))
    product.meta[KEPT_FLOAT] = Reason.GAIN
    result = product.outputs[0]
    result.name, result.dtype, result.shape = layer.names.value(f"{x.name}_gain"), layer.dtype, x.shape
    layer.graph.insert_before(layer.node, product)
    layer.node.replace_input_with(0, result)


def _rotate_constants(stream: Stream, rotation: Rotation) -> None:
    """Rotate the rows of constants, each once; heads that are tied to one go on reading it."""
    tables = {id(layer.weight.source) for layer, _ in stream.readers.values() if id(layer.node) in stream.tied}
    rotated: dict[object, ir.Value] = {}
    for slot, constant in [(slot, slot.view) for slot in stream.constants]:
        if constant.key not in rotated:
            array = rotation.of_rows(constant.tensor().numpy().astype(np.float32)).astype(constant.dtype.numpy())
            rotated[constant.key] = add_initializer(graph_of(slot.node), f"{constant.name}_rotated", array)
            for use in list(constant.source.uses()) if id(constant.source) in tables else []:
                replace_input(use.node, use.idx, rotated[constant.key])
        slot.write(rotated[constant.key])


def _shifts(stream: Stream) -> dict[Slot, list[tuple[LinearLayer, Gained]]]:
    """Collect the layers behind every shift."""
    shifts: dict[Slot, list[tuple[LinearLayer, Gained]]] = {}
    for layer, gained in stream.readers.values():
        if gained is not None and gained.shift is not None:
            shifts.setdefault(gained.shift, []).append((layer, gained))
    return shifts


def _folds(readers: Sequence[tuple[LinearLayer, Gained]]) -> bool:
    """Whether the shift before layers goes into their biases, rather than staying where it is."""
    gains = np.abs([_gain(gained) for _, gained in readers])
    return all(layer.has_bias for layer, _ in readers) or bool(gains.min() <= LEAST_GAIN * gains.max())


def _gain(gained: Gained) -> Array:
    result: Array = np.prod([slot.read() for slot in gained.scales], axis=0)
    return result


def _behind_gain(weight: Array, gained: Gained | None) -> Array:
    """Fold a gain into the weight of a layer behind it."""
    return weight if gained is None else (weight * _gain(gained)[:, None]).astype(np.float32)


def _again(layer: LinearLayer) -> LinearLayer:
    """View a layer again, which may have been written since."""
    again = view(layer.node)
    assert isinstance(again, LinearLayer)
    return again


def rotate_heads(heads: Heads, rotation: Rotation) -> None:
    """Fold a rotation of the values of an attention into the layers that make and read them."""
    for layer, starts in heads.writers.values():
        current = _again(layer)
        weight, bias = current.read(), current.read_bias()
        for part in (slice(start, start + heads.width) for start in starts):
            weight[:, part] = rotation.of_rows(weight[:, part])
            if bias is not None:
                bias[part] = rotation.of_rows(bias[part])
        remember(current)
        current.write(weight, bias)
    for layer in heads.readers.values():
        current = _again(layer)
        weight = current.read()
        for start in range(0, current.k, heads.width):
            weight[start : start + heads.width] = rotation.of_columns(weight[start : start + heads.width])
        remember(current)
        current.write(weight, None)


def turned_heads(heads: Heads, names: Iterable[str]) -> list[Turned]:
    """Read the weights of layers of these names that a rotation of the values of an attention turns, head by head."""
    chosen, width, turned = set(names), heads.width, list[Turned]()
    for layer, starts in heads.writers.values():
        weight = layer.read() if layer.name in chosen else None
        turned += [] if weight is None else [Turned(np.ascontiguousarray(weight[:, i : i + width]), False) for i in starts]
    for layer in heads.readers.values():
        weight = layer.read() if layer.name in chosen else None
        turned += [] if weight is None else [Turned(weight[i : i + width], True) for i in range(0, layer.k, width)]
    return turned


def turned_weights(stream: Stream, names: Iterable[str], seed: int) -> list[Turned]:
    """Read the weights of layers of these names that a rotation of the stream turns: all, or of many a share that memory has room for."""
    chosen, rng, turned = set(names), np.random.default_rng(seed), list[Turned]()
    layers = [*((layer, gained, True) for layer, gained in stream.readers.values()), *((w, None, False) for w in stream.writers.values())]
    layers = [(layer, gained, reads) for layer, gained, reads in layers if layer.name in chosen and id(layer.node) not in stream.tied]
    share = min(1.0, max(MOST_WEIGHTS, 8 * stream.width**2) / max(sum(layer.k * layer.n for layer, _, _ in layers), 1))
    for layer, gained, reads in layers:
        if reads:
            columns = rng.choice(layer.n, max(1, round(share * layer.n)), replace=False) if share < 1 else slice(None)
            turned.append(Turned(_behind_gain(layer.read()[:, columns], gained), True))
        elif share == 1 or rng.random() < share:
            turned.append(Turned(layer.read(), False))
    return turned


@dataclass(frozen=True)
class Rotate(Rewrite):
    """Rotate residual streams and the values of attentions, where everything that reads and writes them can be rotated.

    Attributes:
        auto: Whether to rotate only where it lowers the loss of the model with its weights rounded to nearest.
        optional: Whether nobody asked for it: nothing is said of what cannot be rotated, a model that was not run is left alone, and so
            are values of attentions where no stream is rotated.
        steps: Of the descent from a randomized Hadamard matrix; 0 for that itself.
        seed: Of the matrix.
    """

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "rotate the residual stream so that weights are easier to round, folded into the weights (QuaRot, SpinQuant)"

    auto: bool = False
    steps: int = 100
    seed: int = 0
    optional: bool = False

    @property
    def silent(self) -> bool:
        return self.optional

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        bad = [("steps", self.steps), ("seed", self.seed)]
        return [f"{self.name}: {name}={value} must be 0 or more" for name, value in bad if value < 0]

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        return self._rotate(model, context)[1]

    def change(self, model: ir.Model) -> bool:
        changed, _ = self._rotate(model, Context())
        if changed:
            forget(model)
        return changed

    def _rotate(self, model: ir.Model, context: Context) -> tuple[bool, list[str]]:
        """Rotate what can be rotated; whether anything was, and what to say of it."""
        if context.trial is None and (self.auto or self.optional):
            return False, [] if self.optional else ["rotate: nothing is rotated: the model was not run, which auto needs"]
        streams, changed, notes = find_streams(model), False, list[str]()
        names = [layer.name for layer in context.layers(model)]
        for index, stream in enumerate(streams):
            if not stream.problems:
                verdict = self._try(model, index, stream, names, context)
                changed |= verdict.accepted
                notes.append(verdict.text)
        if not self.optional:
            notes += _refusals(streams)
        elif not changed:  # values alone gain next to nothing
            return False, notes
        turned, remarks = self._rotate_heads(model, names, context)
        return changed or turned, [*notes, *remarks]

    def _rotate_heads(self, model: ir.Model, names: Sequence[str], context: Context) -> tuple[bool, list[str]]:
        """Rotate the values of all attentions where that can be done, if it is exact and pays."""
        found = find_heads(model)
        refused = [heads for heads in found if heads.problems]
        chosen = {i: self._choose(heads, names, context.spec) for i, heads in enumerate(found) if heads.readers and not heads.problems}
        notes = []
        if refused and not self.optional:
            problems = listed(list(refused[0].problems), "; ")
            notes.append(f"rotate: the values of {len(refused)} of {len(found)} attentions are not rotated: {problems}")
        if not chosen:
            return False, notes

        def turn(target: ir.Model) -> None:
            for i, heads in enumerate(find_heads(target)):
                if i in chosen:
                    rotate_heads(heads, chosen[i])
                    context.spill(target)

        verdict = self._judge(model, names, turn, [layer for i in chosen for layer in found[i].readers.values()], context)
        widths = listed(sorted({str(found[i].width) for i in chosen}))
        what = f"the values of {len(chosen)} attentions, heads of {widths} channels"
        if verdict.accepted:
            turn(model)
        said = f"rotate: rotated {what}" if verdict.accepted else f"rotate: {what} are not rotated"
        return verdict.accepted, [*notes, f"{said}: {verdict.text}"]

    def _choose(self, heads: Heads, names: Sequence[str], spec: WeightSpec) -> Rotation:
        """Choose the rotation of the values of an attention."""
        weights = turned_heads(heads, names)
        hadamard = random_rotation(heads.width, self.seed)
        if not self.steps:
            return hadamard
        identity = Rotation(np.ones(heads.width), ())
        unit = np.eye(heads.width)
        start = min((identity, hadamard), key=lambda rotation: gradient(rotation.of_rows(unit), weights, spec)[0])
        return descend(start, weights, spec, self.steps, self.seed)

    def _try(self, model: ir.Model, index: int, stream: Stream, names: Sequence[str], context: Context) -> Verdict:
        """Rotate a stream, if that is exact and pays."""
        start = random_rotation(stream.width, self.seed, stream.keeps_ones)
        rotation = descend(start, turned_weights(stream, names, self.seed), context.spec, self.steps, self.seed)
        layers = [*stream.writers.values(), *(layer for layer, _ in stream.readers.values())]
        verdict = self._judge(model, names, lambda copy: rotate(find_streams(copy)[index], rotation), layers, context)
        what = f"the residual stream of {stream.width} channels at {stream.start}"
        if not verdict.accepted:
            return Verdict(False, f"rotate: {what} is not rotated: {verdict.text}")
        rotate(stream, rotation, lambda: context.spill(model))
        heads = sum(1 for layer, gained in stream.readers.values() if gained is not None and id(layer.node) in stream.tied)
        tied = f"; the gain before {heads} heads that are tables too is a product of its own" if heads else ""
        parts = f"{len(stream.norms)} norms, {len(stream.writers)} layers and {len(stream.constants)} constants that write to it"
        return Verdict(True, f"rotate: rotated {what}: {parts}, {len(stream.readers)} layers that read it{tied}; {verdict.text}")

    def _judge(
        self, model: ir.Model, names: Sequence[str], turn: Callable[[ir.Model], None], layers: Sequence[LinearLayer], context: Context
    ) -> Verdict:
        """Try a rotation of layers on a copy of the model."""
        if context.trial is None:
            return Verdict(True, "not checked: the model was not run")
        trial, copy = context.trial(model), _copy(model)
        turn(copy)
        difference = trial.difference(copy)
        most = max(TOLERANCE[layer.dtype] for layer in layers)
        if not difference <= most:
            return Verdict(False, f"float outputs would differ by {difference:.1e}, more than {most:.0e}")
        text = f"float outputs differ by {difference:.1e}"
        if not self.auto:
            return Verdict(True, text)
        plain = _copy(model)
        losses = []
        for candidate in (plain, copy):
            _round(candidate, names, context.spec)
            losses.append(trial.loss(candidate))
        before, after = losses
        return Verdict(after < before, f"{text}; rounded to nearest, the loss is {after:.4g} with it and {before:.4g} without")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a rotation is made, and why."""

    accepted: bool
    text: str


def _refusals(streams: Sequence[Stream]) -> list[str]:
    """Say why streams are not rotated, or that there are none."""
    if not streams:
        return ["rotate: there is no residual stream: no sum of values is normalized"]
    refused = [stream for stream in streams if stream.problems]
    if not refused:
        return []
    more = f", nor are {len(refused) - 1} others" if len(refused) > 1 else ""
    problems = listed(list(refused[0].problems), "; ")
    return [f"rotate: the residual stream at {refused[0].start} is not rotated{more}: {problems}"]


def _copy(model: ir.Model) -> ir.Model:
    """Copy a model, whose tensors stay where they are."""
    copy = model.clone()
    Names.rescan(copy.graph)
    return copy


def _round(model: ir.Model, names: Sequence[str], spec: WeightSpec) -> None:
    """Round the weights of layers to nearest, to floats."""
    for layer in Context().layers(model):
        if layer.name in names:
            layer.write(rtn.quantize(layer.read(), np.ones(layer.k), spec).dequantize(), None)
