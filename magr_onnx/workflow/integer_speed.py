"""Convolutions that stay float among integer ones, since they are faster so on this machine.

What is computed in integers falls into pieces that share no value: between two of them values are floats whichever way a piece is computed,
so that the time of each is its own. A piece has an integer form, with the rounding of what it reads, and a float form; both are timed as
models of their own, on the values of one sample. Single convolutions inside a piece are not judged: left float there, they would have
their operands and results converted.

HardSigmoid and HardSwish, which take an Add and a Mul of integers each, join pieces that are timed apart. Whether they do is judged in the
whole network, where what is float between two pieces in float stays float.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.grid_type import GridType
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import ActivationGrid, LayerStats
from magr_onnx.errors import MagrError
from magr_onnx.passes import Plan
from magr_onnx.passes.emit import conv as conv_emitter
from magr_onnx.passes.emit import tensors as tensor_emitter
from magr_onnx.passes.emit.hard_activations import ALPHA
from magr_onnx.passes.graph.constants import constant_view
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.instrument.segments import cut
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.conv import OPS, ConvLayer
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.passes.providers import find_provider
from magr_onnx.passes.tensors.connected import connected
from magr_onnx.passes.tensors.region import Region, SharedGrid, Unit
from magr_onnx.report.validation import Latency
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.measure.batch_effect import samples_of
from magr_onnx.runtime.measure.validate import latency
from magr_onnx.runtime.ort.session import Batch, Session, inputs_of
from magr_onnx.workflow import non_linear
from magr_onnx.workflow.context import RunContext, Stopwatch
from magr_onnx.workflow.integer_convolutions import Rounding, may_be_integer, with_room_for_biases
from magr_onnx.workflow.rounded_activations import grid_type, integer_region, rounded_copy

_ROUNDING = Quantize("rtn", 8, None, True, beta=1.0)
LEAST_WORK = 2_000_000
"""Multiplications of all convolutions on a sample, below which nothing is timed: they take a tenth of a millisecond."""
SLOWER = 1.1
"""Times the float form's time from which a piece stays float: so much must lie below the 95% confidence interval."""
GAIN = 1.0
"""Times the integer form's time of the whole model below which the confidence interval must lie for anything to stay float."""
CANDIDATES = ((1.5, True), (SLOWER, True), (0.8, True), (0.0, True), (SLOWER, False), (0.8, False))
"""Such times above which pieces are left float together: those that win by far, those that win alone, some that win by having float
neighbours, and all; and whether hard activations are in integers between pieces that are."""
SECONDS, SECONDS_IN_ALL = 0.1, 3.0
"""Of timing a piece, or five runs in each form, and of timing all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Floats:
    """What stays float for speed.

    Attributes:
        reasons: Why a convolution does, or a hard activation between convolutions, by its name.
        notes: Sentences for the report.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def slower(model: ir.Model, plan: Plan, data: Batches | None, options: Mapping[str, Any] | None, context: RunContext) -> Floats:
    """Find convolutions that would be slower in integers.

    Nothing is timed where this machine is not known to be the one that the file is for (a target, another provider than the CPU), where the
    result may not depend on times (a job directory), or where size is preferred.

    Args:
        model: The float model; not changed.
        plan: The whole plan.
        data: Batches that fit the model.
        options: Those of the run; None for a pipeline, which is taken as it is written.
        context: Of the run.
    """
    asked = options is not None and options.get("prefer", "speed") == "speed"
    here = find_provider(context.provider).host_memory and plan.accumulator is None and context.store is None
    if not asked or not here or context.memory.large or plan.rules is not None or data is None:
        return Floats()
    hard = [layer_name(node) for node in model.graph if node.domain == "" and node.op_type in ALPHA]
    region = integer_region(model, plan, data, context.selection, hard)
    if region is None:
        return Floats()
    trial = _Trial(plan, data, replace(context, progress=lambda *_: None, on_layer=None, stopwatch=Stopwatch()))
    try:
        floats = _slower(model, region, hard, trial)
    except MagrError as error:
        floats = Floats(notes=(f"convolutions were not timed in integers and in float: {str(error).splitlines()[0]}",))
    context.lap("timing")
    return floats


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """How the integer form of a model is made to be timed: with grids and weights that are rounded anyhow.

    Attributes:
        plan: The whole plan.
        data: Batches that fit the whole model.
        context: Of the run, without progress.
    """

    plan: Plan
    data: Batches
    context: RunContext

    def integer_form(self, model: ir.Model, floats: Collection[str] = ()) -> ir.Model:
        """Make the integer form of a model or of a part of it, but for nodes that stay float."""
        copy, selection = model.clone(), self.context.selection
        Names.rescan(copy.graph)
        region = integer_region(copy, self.plan, self.data, selection, floats)
        if region is None:
            return copy
        kind, marks = grid_type(self.plan), tensor_emitter.mark(copy.graph, region)
        rounding = Rounding({name: _some_grid(group, kind) for name, group in marks.items()}, dict.fromkeys(floats, ""))
        result, stage = rounded_copy(copy, rounding.grids, self.plan), self.plan.convolutions
        assert stage is not None
        for readers in by_weight(non_linear.select_convolutions(result, self.plan, selection)[0]):
            integers = [layer for layer in readers if str(layer.x.name) in rounding.grids and may_be_integer(layer)]
            grids = {layer.name: rounding.grids[str(layer.x.name)] for layer in integers}
            solutions = with_room_for_biases(readers, [_nearest(readers[0])] * len(readers), grids)
            conv_emitter.emit(readers, solutions, *non_linear.form_of(readers, stage, rounding, bool(grids), True), grids)
        return result

    def times(self, first: ir.Model, second: ir.Model, feeds: Batch, seconds: float = SECONDS) -> Latency:
        """Time two models on one thread; the second is that called quantized."""
        return latency(first, second, in_memory([feeds], "a sample"), self.context.provider, seconds, threads=1)


def _nearest(layer: ConvLayer) -> LayerSolution:
    """Round the channels of all groups at once."""
    matrix = np.concatenate(list(layer.read()), axis=1)
    problem = LayerProblem(matrix, None, LayerStats.data_free(layer.k, taps=layer.taps), float_type(layer.dtype), taps=layer.taps)
    return _ROUNDING.solve(problem, LayerSolution.unsolved(problem))


def _some_grid(group: SharedGrid, kind: GridType) -> ActivationGrid:
    """Return a grid that begins and ends where the values do, so that activations vanish as they will."""
    if group.exact is not None:
        return kind.exactly(*group.exact)
    return kind.of_range(max(-1.0, group.low), min(1.0, group.high), group.high)


def _slower(model: ir.Model, region: Region, hard: Sequence[str], trial: _Trial) -> Floats:
    feeds, pieces = _sample(model, next(iter(trial.data))), _pieces(region)
    nodes = [node for piece in pieces for node in piece.convolutions.values()]
    names = [*(name for piece in pieces for name in piece.inputs), *map(_input_name, nodes)]
    values = _values(model, feeds, names, trial.context.provider)
    if sum(_multiplications(node, values[_input_name(node)].shape) for node in nodes) < LEAST_WORK:
        return Floats()
    times: dict[str, Latency] = {}
    for piece in pieces:
        inputs = {name: values[name] for name in piece.inputs}
        part = cut(model, inputs, piece.outputs)
        measured = trial.times(part, trial.integer_form(part), inputs, min(SECONDS, SECONDS_IN_ALL / len(pieces)))
        times |= dict.fromkeys(piece.convolutions, measured)
    if not any(each.interval[0] > SLOWER for each in times.values()):
        return Floats()
    integers, tried = trial.integer_form(model), list[tuple[Latency, list[str], Sequence[str]]]()
    for least, lowered in CANDIDATES if hard else [each for each in CANDIDATES if each[1]]:
        floats, left = [name for name, each in times.items() if each.ratio > least], [] if lowered else hard
        tried.append((trial.times(integers, trial.integer_form(model, [*floats, *left]), feeds), floats, left))
    whole, floats, left = min(tried, key=lambda each: each[0].ratio)
    if whole.interval[2] >= GAIN:
        return Floats()
    note = (
        f"{len(floats)} of {len(times)} convolutions that could be computed in integers are computed in float, with 8-bit weights: so the "
        f"model takes {whole.ratio:.2f} times as long on this machine as with all in integers (--prefer size leaves them in integers)"
    )
    activations = dict.fromkeys(left, "computed in float on this machine, as some convolutions around it")
    return Floats({**activations, **{name: _reason(times[name].ratio) for name in floats}}, (note,))


def _reason(ratio: float) -> str:
    if ratio <= 1:
        return "computed in float on this machine, as what is around it"
    return f"computed in float: {ratio:.1f} times as long in integers on this machine, with what is around it"


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A part of a region that shares no value with the rest.

    Attributes:
        inputs: Names of what it reads, constants aside.
        outputs: Names of what is read of it elsewhere.
        convolutions: Its convolutions by name.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    convolutions: Mapping[str, ir.Node]


def _input_name(node: ir.Node) -> str:
    assert node.inputs[0] is not None
    return str(node.inputs[0].name)


def _multiplications(node: ir.Node, shape: tuple[int, ...]) -> int:
    """Count the multiplications of a convolution of an input of some shape, but for the borders."""
    weight, strides = constant_view(node.inputs[1]), node.attributes.get_ints("strides", ())
    assert weight is not None
    batch, _, *places = shape
    return math.prod(weight.shape) * batch * math.prod(places) // max(math.prod(strides), 1)


def _pieces(region: Region) -> list[_Piece]:
    """Cut a region into parts that share no value, as far as they have convolutions."""
    around = {unit: {*unit.reads, *unit.makes} for unit in region.units}
    first: dict[ir.Value, Unit] = {}
    pairs = [(unit, first.setdefault(value, unit)) for unit, values in around.items() for value in values]
    return [piece for units in connected(region.units, pairs) if (piece := _piece(units)).convolutions]


def _piece(units: Sequence[Unit]) -> _Piece:
    made = dict.fromkeys(value for unit in units for value in unit.makes)
    nodes = {*(unit.node for unit in units), *(value.producer() for value in made)}
    inside = {out for node in nodes if node is not None for out in node.outputs}
    read = dict.fromkeys(value for node in nodes if node is not None for value in node.inputs if value is not None and value not in inside)
    outputs = [value for value in made if value.is_graph_output() or any(use.node not in nodes for use in value.uses())]
    return _Piece(
        [str(value.name) for value in read if constant_view(value) is None],
        [str(value.name) for value in outputs],
        {layer_name(unit.node): unit.node for unit in units if unit.node.op_type in OPS},
    )


def _sample(model: ir.Model, batch: Batch) -> Batch:
    """Return the first sample of a batch, or all of a batch that cannot be cut."""
    infos = inputs_of(model)
    return next(iter(samples_of(batch, infos)), batch)


def _values(model: ir.Model, feeds: Batch, names: Sequence[str], provider: str) -> dict[str, npt.NDArray[Any]]:
    """Compute values of a model by their names."""
    computed = [name for name in dict.fromkeys(names) if name not in feeds]
    values = {name: np.asarray(array) for name, array in feeds.items()}
    if computed:
        with Session(cut(model, values, computed), provider) as session:
            values |= zip(computed, session.run(feeds, computed), strict=True)
    return values
