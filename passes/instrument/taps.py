"""Taps: copies of a model that output statistics of chosen values instead of its results.

A value ``x (..., K)`` is treated as rows ``X (n, K)``. Activations never leave onnxruntime, and its optimizer drops what no tap needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.activation_ranges import FINITE
from magr_onnx.core.types import Activation, ActivationGrid, Array, DynamicRange
from magr_onnx.passes.graph.kv_cache import TOKENS, pairs_of
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.opset import raise_opset

# Bins of the logarithmic histogram: 8 an octave, from 2^-20 up to the largest float32, for either sign.
BINS_PER_OCTAVE = 8
LOWEST_EXPONENT = -20
BINS = (128 - LOWEST_EXPONENT) * BINS_PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Tap:
    """A value to measure.

    Attributes:
        value: The value's name.
        width: K.
        masked: Whether the mask leaves out rows: the value has a row for each of its elements, in most batches at least.
        quantize: Quantization of the value before its moments are taken; None for none.
        bounds: Range the value is clipped to first (sentinels such as -1e9 are no signal); None for no clipping.
        few: Whether it has so few rows that these are put out, not their Gram matrix.
        others: Axes other than that of the channels, of the rows ``(n, K)`` if K > 1, else of the value; its sums by channel are put out
            with its range. None for none.
    """

    value: str
    width: int
    masked: bool = False
    quantize: Activation | None = None
    bounds: tuple[float, float] | None = None
    few: bool = False
    others: tuple[int, ...] | None = None


def shape_taps(model: ir.Model, values: Sequence[str]) -> ir.Model:
    """Copy the model to output the run-time shape of each value, in order."""
    copy = Extension(model)
    for i, name in enumerate(values):
        copy.output(copy.add("Shape", [copy.values[name]], f"__shape_{i}"), ir.DataType.INT64, [None])
    return copy.finish()


def gram_taps(model: ir.Model, taps: Sequence[Tap], mask: str | None = None) -> ir.Model:
    """Copy the model with outputs ``X^T X (K, K)``, or X where it has few rows, ``sum(X) (K,)`` and their number for every tap, in order.

    Taps that quantize have another output, the sum of the value before it was quantized ``(K,)``; masked taps have a last one, 0 where
    the rows of this batch do not fit the mask, so that all of them count.

    Args:
        model: The model.
        taps: The values to measure.
        mask: An input of any numeric or boolean type whose nonzero elements mark the rows to count, one element a row.
    """
    copy = Extension(model, mask if any(t.masked for t in taps) else None, opset=13 if any(t.quantize or t.bounds for t in taps) else 0)
    for i, tap in enumerate(taps):
        name = f"__tap_{i}"
        real = copy.real(tap, name)
        read = real
        if tap.quantize is not None:
            read = copy.quantized(real, tap.quantize, copy.scalars(tap.quantize, f"{name}_q"), f"{name}_q")
        rows = copy.rows(read, tap, name)
        if tap.few:
            copy.output(copy.add("Identity", [rows], f"__few_{i}"), shape=[None, tap.width])
        else:
            copy.output(copy.gram(rows, f"__gram_{i}"), shape=[tap.width] * 2)
        copy.output(copy.total(rows, f"__sum_{i}"), shape=[tap.width])
        copy.output(copy.count(rows, tap, f"__rows_{i}"))
        if tap.quantize is not None:
            copy.output(copy.total(copy.rows(real, tap, f"{name}_float"), f"__float_sum_{i}"), shape=[tap.width])
        if tap.masked:
            copy.output(copy.add("Cast", [copy.fits(tap)], f"__masked_{i}", to=ir.DataType.FLOAT), shape=[])
    return copy.finish()


def range_taps(model: ir.Model, taps: Sequence[Tap], mask: str | None = None, sample: int | None = None) -> ir.Model:
    """Copy the model with outputs min, max and histogram ``(2 BINS,)`` for every tap, in order.

    Histograms are of every element, or of at least ``sample`` elements at equal distances, if a value has twice as many.

    The minimum is NaN where any value is not finite.
    The histogram counts negative values in its first half and positive ones in its second, each in bins of a constant ratio
    (`bin_edges`), so that one pass serves values of any magnitude; rows that the mask leaves out fall into the bins next to zero.
    Behind all these are the sum and the sum of squares by channel ``(C,)`` and the number of elements of every tap with `Tap.others`.
    """
    copy = Extension(model, mask if any(t.masked for t in taps) else None, opset=16)  # ScatterElements that adds
    zeros = copy.constant("__hist_zeros", np.zeros(2 * BINS, np.float32))
    one = copy.constant("__hist_one", np.float32(1))
    ratio = copy.constant("__hist_ratio", np.float32(BINS_PER_OCTAVE / np.log(2)))
    low = copy.constant("__hist_low", np.int64(LOWEST_EXPONENT * BINS_PER_OCTAVE))
    high = copy.constant("__hist_high", np.int64(LOWEST_EXPONENT * BINS_PER_OCTAVE + BINS - 1))
    nothing = copy.constant("__hist_float_zero", np.float32(0))
    offsets = copy.constant("__hist_offsets", np.int64(-LOWEST_EXPONENT * BINS_PER_OCTAVE)), copy.constant("__hist_half", np.int64(BINS))
    flat = copy.constant("__hist_flat", np.array([-1]))
    for i, tap in enumerate(taps):
        name = f"__tap_{i}"
        rows = copy.add("Reshape", [copy.rows(copy.real(tap, name), tap, name), flat], f"{name}_flat")
        finite = copy.add("ReduceSum", [copy.add("Mul", [rows, nothing], f"{name}_nothing")], f"{name}_finite", keepdims=0)  # 0 or NaN
        least = copy.add("ReduceMin", [rows], f"{name}_least", keepdims=0)  # onnxruntime's passes over NaN
        copy.output(copy.add("Add", [least, finite], f"__min_{i}"), shape=[])
        copy.output(copy.add("ReduceMax", [rows], f"__max_{i}", keepdims=0), shape=[])
        rows = rows if sample is None else copy.sampled(rows, sample, name)
        exponent = copy.add("Mul", [copy.add("Log", [copy.add("Abs", [rows], f"{name}_abs")], f"{name}_log"), ratio], f"{name}_exponent")
        integer = copy.add("Cast", [copy.add("Floor", [exponent], f"{name}_floor")], f"{name}_int", to=ir.DataType.INT64)
        index = copy.add("Add", [copy.add("Clip", [integer, low, high], f"{name}_bounded"), offsets[0]], f"{name}_bin")
        positive = copy.add("Cast", [copy.add("Greater", [rows, nothing], f"{name}_up")], f"{name}_side", to=ir.DataType.INT64)
        index = copy.add("Add", [index, copy.add("Mul", [positive, offsets[1]], f"{name}_half")], f"{name}_index")
        ones = copy.add("Expand", [one, copy.add("Shape", [rows], f"{name}_count")], f"{name}_ones")
        copy.output(copy.add("ScatterElements", [zeros, index, ones], f"__hist_{i}", axis=0, reduction="add"), shape=[2 * BINS])
    for i, tap in enumerate(taps):
        if tap.others is not None:
            name, axes = f"__channels_{i}", copy.constant(f"__channels_{i}_axes", np.array(tap.others))
            real = copy.real(tap, name) if tap.width == 1 else copy.rows(copy.real(tap, name), tap, name)
            for part, value in (("total", real), ("squares", copy.add("Mul", [real, real], f"{name}_squared"))):
                copy.output(copy.add("ReduceSum", [value, axes], f"{name}_{part}", keepdims=0), shape=[None])
            copy.output(copy.add("Size", [real], f"{name}_size"), ir.DataType.INT64, shape=[])
    return copy.finish()


def channel_taps(model: ir.Model, values: Sequence[str], positions: int) -> ir.Model:
    """Copy the model with outputs for every value ``(batch, C, ...)``, in order: the largest magnitude of every channel ``(C,)``, and
    samples of channels at about so many ``positions`` of every sample, ``(n, C)``."""
    copy = Extension(model, opset=18)  # ReduceMax of axes that are an input
    axes = copy.constant("__channels_axes", np.array([0, 2]))
    for i, value in enumerate(values):
        name = f"__channels_{i}"
        real = copy.add("Cast", [copy.values[value]], f"{name}_real", to=ir.DataType.FLOAT)
        flat = copy.add("Reshape", [real, copy.constant(f"{name}_shape", np.array([0, 0, -1]))], f"{name}_flat")
        copy.output(copy.add("ReduceMax", [copy.add("Abs", [flat], f"{name}_abs"), axes], f"{name}_largest", keepdims=0))
        turned = copy.add("Transpose", [copy.sampled(flat, positions, name, 2)], f"{name}_turned", perm=[0, 2, 1])
        channels = copy.add("Shape", [flat], f"{name}_channels", start=1, end=2)
        shape = copy.add("Concat", [copy.constant(f"{name}_rows", np.array([-1])), channels], f"{name}_wide", axis=0)
        copy.output(copy.add("Reshape", [turned, shape], f"{name}_samples"), shape=[None, None])
    return copy.finish()


def bin_edges() -> Array:
    """Return the edges of the bins of one sign, ``(BINS + 1,)`` float64."""
    result: Array = 2.0 ** (LOWEST_EXPONENT + np.arange(BINS + 1) / BINS_PER_OCTAVE)
    return result


class ErrorTaps(NamedTuple):
    """A model that measures the errors of grids, which are inputs of it.

    Attributes:
        model: The model.
        inputs: Names of the inputs for every tap, in the order of `grid_arrays`.
    """

    model: ir.Model
    inputs: list[list[str]]

    def feeds(self, grids: Sequence[Sequence[Activation]]) -> dict[str, npt.NDArray[Any]]:
        """Return what to feed for ``grids`` of every tap, of the type that they had and as many."""
        of_taps = zip(self.inputs, map(grid_arrays, grids), strict=True)
        return {name: array for names, arrays in of_taps for name, array in zip(names, arrays.values(), strict=True)}


def grid_arrays(grids: Sequence[Activation]) -> dict[str, npt.NDArray[Any]]:
    """Return what tells grids of one type apart, each as an array of one element a grid."""
    static = [grid for grid in grids if isinstance(grid, ActivationGrid)]
    if not static:
        ranges = np.clip([(grid.low, grid.high) for grid in grids if isinstance(grid, DynamicRange)], *FINITE)
        return dict(zip(("least", "most"), ranges.astype(np.float32).T, strict=True))
    scales = np.array([grid.scale for grid in static], np.float32)
    if static[0].bits == 8:
        return {"scale": scales, "zero": np.array([grid.zero_point for grid in static], static[0].dtype)}
    least, most = np.array([grid.multiples for grid in static], np.float32).T
    return {"scale": scales, "least": least, "most": most}


def error_taps(
    model: ir.Model, taps: Sequence[Tap], sketches: Sequence[Array], grids: Sequence[Sequence[Activation]], mask: str | None = None
) -> ErrorTaps:
    """Copy the model to measure the output error of rounding a value to grids, which are inputs: one session serves any grids.

    For every tap ``i``, in order: for each of its grids the sum of squares of ``E A``, ``(J,)``, and its column sums ``(J, r)``, where
    ``E = grid(X) - X`` and ``A (K, r)`` is ``sketches[i]``; those of ``X A``, ``()`` and ``(r,)``; and the rows counted.

    Args:
        model: The model.
        taps: The values to measure.
        sketches: A matrix ``(K, r)`` for every tap: the weights that read it, or a projection of them.
        grids: Grids of every tap, which say of which type and how many the others are.
        mask: See `gram_taps`.
    """
    copy, inputs = Extension(model, mask if any(t.masked for t in taps) else None, opset=13), []
    for i, (tap, sketch, candidates) in enumerate(zip(taps, sketches, grids, strict=True)):
        name, arrays = f"__tap_{i}", grid_arrays(candidates)
        values = [copy.input(f"{name}_{part}", array) for part, array in arrays.items()]
        inputs.append([str(value.name) for value in values])
        real = copy.real(tap, name)
        weights = copy.constant(f"{name}_sketch", sketch.astype(np.float32))
        rows = copy.rows(real, tap, name)
        parts = [ir.val(copy.names.value(f"{name}_{part}_of_one"), v.dtype, []) for part, v in zip(arrays, values, strict=True)]
        body = ir.Graph(parts, [], nodes=[], name=f"{name}_body", opset_imports={"": copy.opset})
        rounded = copy.quantized(real, candidates[0], dict(zip(arrays, parts, strict=True)), f"{name}_rounded", body)
        difference = copy.rows(copy.add("Sub", [rounded, real], f"{name}_difference", body), tap, f"{name}_of_one", body)
        body.outputs.extend(copy.energy(difference, weights, f"{name}_error", body))
        outputs = [ir.val(f"{name}_{what}") for what in ("energies", "totals")]
        scan = ir.node("Scan", values, {"body": body, "num_scan_inputs": len(values)}, outputs=outputs, name=f"{name}_scan")
        results = (*copy.append(copy.model.graph, scan), *copy.energy(rows, weights, f"{name}_power"))
        for value, rank in zip(results, (1, 2, 0, 1), strict=True):
            copy.output(value, shape=[None] * rank)
        copy.output(copy.count(rows, tap, f"{name}_rows_counted"))
    return ErrorTaps(copy.finish(), inputs)


@dataclass(frozen=True, slots=True, eq=False)
class _Mask:
    """The mask of the current tokens."""

    shape: ir.Value
    rows: ir.Value  # its elements as booleans ``(n, 1)``
    total: ir.Value  # the number of those that are true ``(1,)``
    fixed: bool  # whether the model fixes its shape


class Extension:
    """A copy of a model to add nodes to; `finish` replaces its outputs."""

    def __init__(self, model: ir.Model, mask: str | None = None, opset: int = 0) -> None:
        self.model = model.clone()
        if self.model.opset_imports.get("", 0) < opset:  # converters drop unused values that taps may read; `finish` removes these outputs
            graph = self.model.graph
            unread = [v for node in graph for v in node.outputs if v.name and not v.uses() and not v.is_graph_output()]
            graph.outputs.extend(unread)
        raise_opset(self.model, opset)
        self.opset = self.model.opset_imports.get("", 13)
        self.values, self.names = _values(self.model), Names.rescan(self.model.graph)
        self._outputs: list[ir.Value] = []
        self._mask: _Mask | None = None
        self._kept_rows: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._fits: dict[str, ir.Value] = {}
        if mask is not None:
            truth = self.add("Cast", [self._current(mask)], "__mask_bool", to=ir.DataType.BOOL)
            rows = self.add("Reshape", [truth, self.constant("__mask_shape", np.array([-1, 1]))], "__mask_rows")
            real = self.add("Cast", [rows], "__mask_float", to=ir.DataType.FLOAT)
            declared = self.values[mask].shape
            fixed = declared is not None and declared.is_static()
            self._mask = _Mask(self.add("Shape", [truth], "__mask_extent"), rows, self.total(real, "__mask_total"), fixed)

    def add(self, op: str, inputs: Sequence[ir.Value | None], name: str, graph: ir.Graph | None = None, **attributes: Any) -> ir.Value:
        """Append a node to the main graph or a subgraph and return its output; both get ``name`` if it is free."""
        return self.append(self.model.graph if graph is None else graph, ir.node(op, inputs, attributes, name=name))[0]

    def along(
        self, op: str, value: ir.Value | None, axes: Sequence[int], name: str, graph: ir.Graph | None = None, since: int = 13, **more: Any
    ) -> ir.Value:
        """Add an operator whose axes are an input from opset ``since`` on, and an attribute before."""
        if self.opset < since:
            return self.add(op, [value], name, graph, axes=list(axes), **more)
        return self.add(op, [value, self.constant(f"{name}_axes", np.array(axes, np.int64))], name, graph, **more)

    def append(self, graph: ir.Graph, node: ir.Node) -> Sequence[ir.Value]:
        """Append a node to the graph or a subgraph; return its outputs, named after the node if they have no name."""
        for output in node.outputs:
            output.name = output.name or node.name
        self.names.adopt([node])
        graph.append(node)
        return node.outputs

    def input(self, name: str, example: npt.NDArray[Any]) -> ir.Value:
        """Add an input like an array."""
        value = ir.val(self.names.value(name), ir.DataType.from_numpy(example.dtype), example.shape)
        self.model.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        return add_initializer(self.model.graph, name, array)

    def _current(self, mask: str) -> ir.Value:
        """Return the mask of the current tokens (see `magr_onnx.passes.graph.kv_cache.current_mask`)."""
        full = self.values[mask]
        if TOKENS not in self.values or not pairs_of(self.model):
            return full
        columns = self.add("Gather", [self.add("Shape", [self.values[TOKENS]], "__mask_tokens"), self._one("axis", 1)], "__mask_columns")
        start = self.add("Neg", [columns], "__mask_start")
        return self.add("Slice", [full, start, self._one("end", np.iinfo(np.int64).max), self._one("axes", 1)], "__mask_current")

    def _one(self, name: str, value: int) -> ir.Value:
        return self.constant(f"__mask_{name}", np.array([value]))

    def real(self, tap: Tap, name: str) -> ir.Value:
        """Return the tapped value as float32, clipped to its bounds."""
        real = self.add("Cast", [self.values[tap.value]], f"{name}_float32", to=ir.DataType.FLOAT)
        if tap.bounds is None:
            return real
        limits = [self.constant(f"{name}_{side}", np.float32(b)) for side, b in zip(("low", "high"), tap.bounds, strict=True)]
        return self.add("Clip", [real, *limits], f"{name}_clipped")

    def rows(self, real: ir.Value, tap: Tap, name: str, graph: ir.Graph | None = None) -> ir.Value:
        """Reshape to rows ``(n, K)``, with masked rows set to zero, whatever they hold; in a body only where the main graph has done so."""
        rows = self.add("Reshape", [real, self.constant(f"{name}_shape", np.array([-1, tap.width]))], f"{name}_rows", graph)
        if not tap.masked or self._mask is None:
            return rows
        kept, _ = self._kept(self._mask, tap, rows, name)
        if self.opset < 9:  # there is no Where, and NaN times 0 is NaN
            kept = self.add("Cast", [kept], f"{name}_weights", graph, to=ir.DataType.FLOAT)
            return self.add("Mul", [rows, kept], f"{name}_counted", graph)
        return self.add("Where", [kept, rows, self.constant(f"{name}_nothing", np.float32(0))], f"{name}_counted", graph)

    def fits(self, tap: Tap) -> ir.Value:
        """Return a boolean: whether the value of a masked tap has a row per mask element in this batch."""
        assert self._mask is not None
        if tap.value not in self._fits:
            name = f"__fits_{len(self._fits)}"
            shape = self.add("Shape", [self.values[tap.value]], f"{name}_shape")
            if self.opset >= 10:
                ends = [self.constant(f"{name}_{end}", np.array([at])) for end, at in (("first", 0), ("last", -1))]
                outer = self.add("Slice", [shape, *ends], f"{name}_outer")
            else:
                outer = self.add("Slice", [shape], f"{name}_outer", starts=[0], ends=[-1])
            same = self.add("Equal", [outer, self._mask.shape], f"{name}_equal")
            real = self.add("Cast", [same], f"{name}_real", to=ir.DataType.FLOAT)
            least = self.add("ReduceMin", [real], f"{name}_least", keepdims=0)
            self._fits[tap.value] = self.add("Cast", [least], f"{name}_all", to=ir.DataType.BOOL)
        return self._fits[tap.value]

    def _kept(self, mask: _Mask, tap: Tap, rows: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Return which rows of a value count ``(n, 1)``, and how many; all of them if they do not fit the mask."""
        if tap.value not in self._kept_rows:
            if self.opset < 11 and mask.fixed:  # an If required equal shapes then, and the shape is fixed here
                self._kept_rows[tap.value] = mask.rows, mask.total
            else:
                self._kept_rows[tap.value] = self._kept_by_shape(mask, tap, rows, f"{name}_by_mask")
        return self._kept_rows[tap.value]

    def _kept_by_shape(self, mask: _Mask, tap: Tap, rows: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        one = self.constant(f"{name}_one", np.ones((1, 1), np.bool_))
        size = self.add("Gather", [self.add("Shape", [rows], f"{name}_size"), self.constant(f"{name}_axis", np.array([0]))], f"{name}_n")
        count = self.add("Cast", [size], f"{name}_rows", to=ir.DataType.FLOAT)
        branches = [self._branch(f"{name}_{i}", values) for i, values in enumerate(((mask.rows, mask.total), (one, count)))]
        bodies = dict(zip(("then_branch", "else_branch"), branches, strict=True))
        outputs = [ir.val(f"{name}_{part}") for part in ("kept", "count")]
        kept, total = self.append(self.model.graph, ir.node("If", [self.fits(tap)], bodies, outputs=outputs, name=name))
        return kept, total

    def _branch(self, name: str, values: Sequence[ir.Value]) -> ir.Graph:
        """Build a body of an If that outputs outer values: booleans and a float, of any shape."""
        body = ir.Graph([], [], nodes=[], name=name)
        for i, (value, dtype) in enumerate(zip(values, (ir.DataType.BOOL, ir.DataType.FLOAT), strict=True)):
            (output,) = self.append(body, ir.node("Identity", [value], name=f"{name}_{i}"))
            output.dtype = dtype
            body.outputs.append(output)
        return body

    def scalars(self, grid: Activation, name: str) -> dict[str, ir.Value]:
        """Return the `grid_arrays` of one grid as constants; none of a dynamic range that clips nothing."""
        arrays = grid_arrays([grid]) if isinstance(grid, ActivationGrid) or grid.clips else {}
        return {part: self.constant(f"{name}_{part}", array[0]) for part, array in arrays.items()}

    def quantized(
        self, real: ir.Value, grid: Activation, parts: Mapping[str, ir.Value], name: str, graph: ir.Graph | None = None
    ) -> ir.Value:
        """Quantize and dequantize the value, as float32, on a grid of the type of ``grid`` with the scalars ``parts`` of `grid_arrays`."""
        if isinstance(grid, ActivationGrid):
            scale = parts["scale"]
            if grid.bits > 8:  # of which QuantizeLinear has codes from opset 21 on only
                steps = self.add("Round", [self.add("Div", [real, scale], f"{name}_steps", graph)], f"{name}_whole", graph)
                within = self.add("Clip", [steps, parts["least"], parts["most"]], f"{name}_within", graph)
                return self.add("Mul", [within, scale], f"{name}_values", graph)
            zero = parts["zero"]
            codes = self.add("QuantizeLinear", [real, scale, zero], f"{name}_codes", graph)
        else:
            if parts:
                real = self.add("Clip", [real, parts["least"], parts["most"]], f"{name}_within", graph)
            outputs = [ir.val(f"{name}_{part}") for part in ("codes", "scale", "zero")]
            node = ir.node("DynamicQuantizeLinear", [real], outputs=outputs, name=f"{name}_codes")
            codes, scale, zero = self.append(self.model.graph if graph is None else graph, node)
        return self.add("DequantizeLinear", [codes, scale, zero], f"{name}_values", graph)

    def energy(self, rows: ir.Value, weights: ir.Value, name: str, graph: ir.Graph | None = None) -> list[ir.Value]:
        """Return the sum of squares of ``rows weights`` and its column sums."""
        product = self.add("MatMul", [rows, weights], name, graph)
        results = [self.add("ReduceSumSquare", [product], f"{name}_energy", graph, keepdims=0), self.total(product, f"{name}_total", graph)]
        for result, rank in zip(results, (0, 1), strict=True):
            result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape([None] * rank)
        return results

    def sampled(self, value: ir.Value, count: int, name: str, axis: int = 0) -> ir.Value:
        """Return at least ``count`` places along an axis at equal, odd distances, or all of them if there are fewer."""
        one, zero, end = self._one("one", 1), self._one("zero", 0), self._one("end", np.iinfo(np.int64).max)
        size = self.add("Shape", [value], f"{name}_of", start=axis, end=axis + 1)
        half = self.add("Div", [size, self.constant(f"{name}_most", np.array([2 * count]))], f"{name}_half")
        odd = self.add("Sub", [self.add("Add", [half, half], f"{name}_even"), one], f"{name}_odd")
        return self.add("Slice", [value, zero, end, self._one("axis", axis), self.add("Max", [odd, one], f"{name}_step")], f"{name}_sample")

    def gram(self, rows: ir.Value, name: str) -> ir.Value:
        """Return ``rows^T rows``."""
        addend = [] if self.opset >= 11 else [self.constant(f"{name}_zero", np.zeros(1, np.float32))]
        return self.add("Gemm", [rows, rows, *addend], name, transA=1)

    def total(self, value: ir.Value, name: str, graph: ir.Graph | None = None) -> ir.Value:
        """Sum over rows."""
        return self.along("ReduceSum", value, [0], name, graph, keepdims=0)

    def count(self, rows: ir.Value, tap: Tap, name: str) -> ir.Value:
        """Return the number of unmasked rows."""
        if tap.masked and self._mask is not None:
            return self.add("Identity", [self._kept(self._mask, tap, rows, name)[1]], name)
        return self.add("Cast", [self.add("Shape", [rows], f"{name}_size")], name, to=ir.DataType.FLOAT)

    def output(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, shape: Sequence[int | None] = (None,)) -> None:
        value.dtype, value.shape = dtype, ir.Shape(shape)
        self._outputs.append(value)

    def finish(self) -> ir.Model:
        self.model.graph.outputs.clear()
        self.model.graph.outputs.extend(self._outputs)
        return self.model


def _values(model: ir.Model) -> dict[str, ir.Value]:
    values = {v.name: v for v in model.graph.inputs if v.name is not None}
    for node in model.graph:
        values.update({v.name: v for v in node.outputs if v.name is not None})
    values.update(model.graph.initializers)
    return values
