"""Equalization across convolutions: channels are scaled before they share the grid of a tensor, at no cost at inference.

Between two convolutions a channel can be multiplied by any positive ``s_c``: the first one's weight and bias by ``s_c``, the second one's
weight by ``1 / s_c`` (Nagel et al., arXiv 1906.04721, section 4.1). What is between must allow it: Relu and the like do, and sums do if all
terms are scaled alike, so that values form classes with one scale a channel.

Candidates are ``(r / r_c)^a`` for the largest and the root mean square value of a channel as ``r_c``. Each is judged by the noise that
reaches the readers of the class, with weights ``w_c`` and inputs of power ``P_c``:

    sum_c E_c^2 |w_c|^2 / s_c^2  +  sum_n d_n^2 / 12 sum_c s_c^2 P_c,

where ``E_c`` is the error of rounding samples of the scaled channel to the best grid for all channels, and ``d_n`` the step of the scaled
weights of output channel ``n``.

A Clip at ``h`` stays where it is: channels that reach it keep their scale, and others are scaled as far as they stay below it, so that it
does not cut them off. How far beyond the values seen others go is estimated by parts of the samples: `headroom`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import rounded
from magr_onnx.core.types import ActivationGrid, Array
from magr_onnx.passes.graph.constants import clip_bounds
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.passes.tensors.connected import connected

LARGEST = 100.0  # of the scales of a class, relative to the least
LEAST_HEADROOM, MOST_HEADROOM = 1.1, 1.4
GAIN = 0.95  # largest ratio of noises that is worth a change
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
SHRINKS = (1.0, 0.8, 0.65, 0.5)
_ALIKE = ("AveragePool", "Clip", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Relu", "Resize", "Add", "Sub")
"""Operators that may commute with factors of channels."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelClass:
    """Values whose channels have one scale.

    Attributes:
        values: The values, in graph order.
        makers: Convolutions that make some of them.
        readers: Convolutions that read some of them.
        limit: Least upper bound of a Clip between them.
    """

    values: tuple[ir.Value, ...]
    makers: tuple[ConvLayer, ...]
    readers: tuple[ConvLayer, ...]
    limit: float


def classes_of(graph: ir.Graph, layers: Sequence[ConvLayer]) -> list[ChannelClass]:
    """Find the classes of the main graph that can be scaled, in graph order.

    Args:
        graph: The main graph.
        layers: Nodes of operator Conv that take a bias. Those whose constants have other readers are not changed.
    """
    convs = {group[0].node: group[0] for group in by_weight(layers) if len(group) == 1 and _has_own_constants(group[0])}
    alike = dict.fromkeys(node for node in graph if node.domain == "" and node.op_type in _ALIKE and _is_homogeneous(node))
    groups = connected(
        (value for node in graph if node in convs or node in alike for value in (*_scaled_inputs(node), node.outputs[0])),
        ((value, node.outputs[0]) for node in alike for value in _scaled_inputs(node)),
    )
    free = [values for values in groups if not any(_is_fixed(value, convs, alike) for value in values)]
    classes = [_class_of(values, convs) for values in free]
    return [group for group in classes if group.makers and group.readers]


def _has_own_constants(layer: ConvLayer) -> bool:
    """Whether nothing else reads the weight and the bias of a convolution."""
    values = [value for value in layer.node.inputs[1:] if value is not None]
    return all(value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def _is_fixed(value: ir.Value, convs: Collection[ir.Node], alike: Collection[ir.Node]) -> bool:
    """Whether something else makes or reads a value, so that it cannot be scaled."""
    if value.is_graph_output() or not (value.producer() in convs or value.producer() in alike):
        return True
    return any(use.idx > (1 if use.node in alike else 0) or not (use.node in convs or use.node in alike) for use in value.uses())


def _class_of(values: Sequence[ir.Value], convs: Mapping[ir.Node, ConvLayer]) -> ChannelClass:
    makers = [maker for value in values if (maker := value.producer()) is not None]
    readers = [convs[use.node] for value in values for use in value.uses() if use.node in convs]
    limit = min((clip_bounds(node)[1] for node in makers if node.op_type == "Clip"), default=math.inf)
    return ChannelClass(tuple(values), tuple(convs[node] for node in makers if node in convs), tuple(readers), limit)


def _scaled_inputs(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs[: 2 if node.op_type in ("Add", "Sub") else 1] if value is not None)


def _is_homogeneous(node: ir.Node) -> bool:
    """Whether a node commutes with positive factors of channels."""
    if node.op_type in ("Add", "Sub"):  # of values of one shape
        shapes = [value.shape for value in node.inputs if value is not None]
        return len(shapes) == 2 and all(s is not None and s.rank() >= 3 for s in shapes) and shapes[0] == shapes[1]
    if node.op_type == "Resize":
        beyond = node.attributes.get_float("extrapolation_value", 0.0)
        return beyond == 0 and node.attributes.get_string("mode", "nearest") in ("nearest", "linear", "cubic")
    if node.op_type == "Clip":
        low, high = clip_bounds(node)
        return low == 0 < high
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples of a value.

    Attributes:
        rows: Channels at some positions ``(n, C)``.
        peaks: Largest magnitude in every channel, at any position, in parts of the samples ``(parts, C)``.
    """

    rows: Array
    peaks: Array


def scales(group: ChannelClass, samples: Sequence[Samples], bits: int) -> Array | None:
    """Choose the scales ``(C,)`` of a class by samples of its values, for weights of so many bits; None if none gains `GAIN`."""
    peaks = np.max([each.peaks for each in samples], axis=0)
    largest = peaks.max(axis=0)
    if not largest.max(initial=0) > 0 or not np.isfinite(largest).all():
        return None
    power = np.mean([np.square(each.rows).mean(axis=0) for each in samples], axis=0)
    weights = [np.abs(_constant(layer, 1)).reshape(layer.group, layer.n, layer.shape[1], -1) for layer in group.readers]
    norms = sum(np.square(w).sum(axis=(1, 3)).reshape(-1) for w in weights)
    strongest = [w.max(axis=3) for w in weights]

    def noise(factors: Array) -> float:
        rounding = sum(_rounding(each.rows * factors) for each in samples)
        total = float((rounding * norms / factors**2).sum())
        for peak in strongest:  # (G, n, C / G)
            inner = factors.reshape(len(peak), 1, -1)
            steps = 2 * (peak / inner).max(axis=2) / (2**bits - 1)
            total += float((np.square(steps).sum(axis=1) / 12 * (power.reshape(len(peak), -1) * inner[:, 0] ** 2).sum(axis=1)).sum())
        return total

    best, least = None, GAIN * noise(np.ones(len(largest)))
    for spread in (largest, np.sqrt(power)):
        for exponent in EXPONENTS:
            factors = (spread.max() / np.maximum(spread, spread.max() / LARGEST)) ** exponent
            if math.isfinite(group.limit):
                factors = np.maximum(np.minimum(factors, group.limit / (headroom(peaks) * np.maximum(largest, group.limit / LARGEST))), 1)
            if (candidate := noise(factors)) < least:
                best, least = factors, candidate
    return best


def headroom(peaks: Array) -> Array:
    """Estimate how far every channel goes beyond its largest value seen ``(parts, C)``, as a factor ``(C,)``.

    A part goes so far beyond the others. Squared, since one part more was seen by chance, or less; at least that of three quarters of the
    channels, and `LEAST_HEADROOM`. Infinite where half of the channels go beyond by more than `MOST_HEADROOM`, or there is one part only.
    """
    active = peaks.max(axis=0) > 0
    if len(peaks) < 2 or not active.any():
        return np.full(peaks.shape[1], np.inf)
    second, first = np.sort(peaks, axis=0)[-2:]
    squares = (first / np.maximum(second, np.finfo(np.float32).tiny)) ** 2
    result: Array = np.maximum(np.maximum(squares, np.quantile(squares[active], 0.75)), LEAST_HEADROOM)
    return result if np.median(result) <= MOST_HEADROOM else np.full(peaks.shape[1], np.inf)


def _rounding(rows: Array) -> Array:
    """Return the mean squared error of every channel ``(C,)`` on the 8-bit grid of least error for all of them."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    errors = []
    for shrink in SHRINKS:
        grid = ActivationGrid.of_range(low * shrink, high * shrink)
        errors.append(np.square(rounded(rows, grid) - rows).mean(axis=0))
    best: Array = min(errors, key=lambda error: float(error.sum()))
    return best


def scale(group: ChannelClass, factors: Array) -> None:
    """Multiply the channels of a class by ``factors (C,)``: weights and biases of its makers, weights of its readers."""
    for layer in group.makers:
        shape = (-1, *[1] * (len(layer.shape) - 1))
        layer.write(1, _constant(layer, 1) * factors.reshape(shape))
        if layer.has_bias:
            layer.write(2, _constant(layer, 2) * factors)
    for layer in group.readers:
        inner = factors.reshape(layer.group, 1, layer.shape[1], *[1] * len(layer.kernel))
        parts = _constant(layer, 1).reshape(layer.group, layer.n, *layer.shape[1:])
        layer.write(1, (parts / inner).reshape(layer.shape))


def _constant(layer: ConvLayer, index: int) -> Array:
    """Read an initializer of a convolution, as float64."""
    array: Array = layer.node.inputs[index].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    return array
