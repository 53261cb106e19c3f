"""What a run will take, from the shapes of its layers and from short measurements on this machine; nothing is written.

The time of a solver is measured on problems of made-up rows, one for each number of inputs, with two numbers of output channels: what is
common to all channels (factorizations, the trials that choose options) grows with ``K^3``, and what is done for each channel with ``K^2``.
Calibration is passes over the data, timed on its first batch, and sums of Gram matrices, counted in multiplications.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Unpack

import numpy as np

from magr_onnx.config.arguments import DEFAULTS, OMITTED, Arguments, explicit, in_order
from magr_onnx.config.invocation import Invocation, python_call
from magr_onnx.core import threads
from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.backends import HOST
from magr_onnx.core.gram import Array, few
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.moments import MomentAccumulator, split_stats
from magr_onnx.core.types import ActivationGrid, LayerStats
from magr_onnx.errors import translate_resource_errors
from magr_onnx.model_io import files
from magr_onnx.passes import Plan
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.experts import ExpertLayer
from magr_onnx.report.data import megabytes
from magr_onnx.runtime.calibration.first_shapes import first_shapes
from magr_onnx.runtime.calibration.fisher import MAX_WIDTH
from magr_onnx.runtime.data.hold_out import HELD_OUT, NONE, HoldOut, Parts
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.measure.layer_errors import some_for
from magr_onnx.runtime.ort import worker
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import arithmetic, experts, growth, size_model, tied_tables, tuning
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.prepare import Prepared, prepare
from magr_onnx.workflow.progress import duration
from magr_onnx.workflow.request import OptimizeRequest, resolve

MOST_INPUTS = 2048
"""Inputs of the largest problem that is solved to measure; wider layers are extrapolated by the powers of K."""

MANY_ROWS = 2
"""Times as many rows as inputs, which are as good as more: solvers see the Gram matrix alone."""

FEW_COLUMNS, MANY_COLUMNS = 512, 4096
"""Output channels of the two problems of a number of inputs: trials take a sample of fewer, and threads share all of them."""

PRODUCT = 1024
"""Size of the product that the rate of multiplication is measured with."""

PASSES, RANGES, GRADIENTS, TUNING = 5.0, 9.0, 7.0, 4.0
"""Passes of the float model that take as long: calibration with error feedback, of two models in segments; measuring ranges; gradients;
an epoch of tuning scales."""

STAGE = 0.03
"""Seconds that sessions take to begin for every input of layers, with error feedback."""

SUMS, PAIRED_SUMS = 2.0, 4.0
"""Floating-point operations for each row and element of a Gram matrix; with error feedback there are three, two of them symmetric."""

CHECK_SECONDS, CHECK_PASSES, ARITHMETIC_PASSES = 0.4, 60, 40
"""Comparing and timing the models at the end: so many seconds, and passes of a batch; and passes to compare int8 inputs with float ones."""

TARGETS = 1.5
"""Times as long as solvers take towards their weights' own outputs, where error feedback gives them others."""

BASE = 200_000_000
"""Bytes of the process without any model."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is expected to take on this machine.

    Attributes:
        source: Name of the model.
        layers: Linear layers that would be converted.
        weights: Their elements.
        rows: Most rows that a layer is calibrated with; 0 for none.
        gigaflops: Rate of products of float32 here, 10^9 floating-point operations a second.
        seconds: Expected wall time by stage, as a report has it afterwards.
        memory: Expected peak of this process, bytes.
        bytes_before: Size of the source.
        bytes_after: Expected size of the result.
        notes: What the run does beside this, which is not in the forecast.
    """

    source: str
    layers: int
    weights: int
    rows: int
    gigaflops: float
    seconds: Mapping[str, float]
    memory: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Describe it in a few lines."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{stage} {duration(each)}" for stage, each in self.seconds.items() if each >= 0.01 * total)
        lines = [
            f"{self.source}: {self.layers} linear layers, {self.weights / 1e6:.1f} million weights, "
            + (f"up to {self.rows:,} rows each" if self.rows else "data-free"),
            f"time     about {duration(total)} ({parts})",
            f"memory   about {self.memory / 1e9:.1f} GB",
            f"file     {megabytes(self.bytes_before)} now, about {megabytes(self.bytes_after)} afterwards",
            f"measured {self.gigaflops:.0f} GFLOP/s on {threads.count()} threads; nothing was written",
        ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def forecast(model: Any = OMITTED, calibration: Source | None = OMITTED, **arguments: Unpack[Arguments]) -> Forecast:
    """Forecast what `magr_onnx.optimize` would take with the same arguments: time, memory and the size of the result; nothing is written.

    Args:
        model: As for `magr_onnx.optimize`.
        calibration: As for `magr_onnx.optimize`.
        **arguments: As for `magr_onnx.optimize`.

    Raises:
        MagrError: What the run would raise before its long work.
    """
    call = in_order(explicit(model=model, calibration=calibration, **arguments))
    return measure(resolve(call, Invocation(python_call("magr_onnx.forecast", call, DEFAULTS))))


@translate_resource_errors()
def measure(request: OptimizeRequest) -> Forecast:
    """Forecast a run.

    It loads the model, checks everything that a run checks before its long work, runs the model on the first batch of its data, and solves
    problems of made-up data.

    Args:
        request: The run.

    Raises:
        MagrError: What the run would raise before its long work.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads.single_threaded_blas())
        prepared, context = prepare(replace(request, resume=None, workers=None), stack)
        prepared = tuning.planned(prepared, context)
        worker.wait()
        rate, rows = product_rate(), _rows(prepared, context)
        passes = _Passes.timed(prepared, rows, rate, context)
        products = {layer.name: rows.get(layer.reads, 0) * layer.k * layer.n for layer in prepared.layers}
        prepared = _without_floats(prepared, request, context)
        seconds = {"load": context.stopwatch.seconds["load"], **passes.calibration(prepared, rows, products, rate)}
        plan, samples = prepared.plan, None if prepared.data is None else prepared.data.samples
        seconds["quantize"] = _solving(_matrices(prepared, rows), samples, context) * (1.0 if plan.error_feedback is None else TARGETS)
        weights = sum(layer.k * layer.n for layer in prepared.layers)
        if passes.batch and weights >= arithmetic.LEAST_WEIGHTS and plan.activations is None:
            seconds["arithmetic"] = ARITHMETIC_PASSES * passes.batch
        seconds["check"] = passes.check
        plans = dict.fromkeys([layer.name for layer in prepared.layers], plan)
        return Forecast(
            source=prepared.name,
            layers=len(prepared.layers),
            weights=weights,
            rows=max(rows.values(), default=0),
            gigaflops=rate / 1e9,
            seconds=seconds,
            memory=_memory(prepared, rows, context),
            bytes_before=prepared.bytes,
            bytes_after=files.model_bytes(size_model.converted(prepared.model, plans, calibrated=prepared.data is not None))
            + sum(experts.packed_bytes(plan, layer, prepared.data is not None) - layer.bytes for layer in _mixtures(prepared)),
            notes=tuple(_left_out(prepared, request)),
        )


def _without_floats(prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Prepared:
    """Leave out layers that a run leaves float for the size of the file.

    Raises:
        ModelError: There is nothing else.
    """
    model, plan = prepared.model, prepared.plan
    tied = tied_tables.tied_weights(model, plan, context.selection) if request.budget is None else frozenset()
    layers, skips = growth.without_growing(model, prepared.layers, plan, tied, request)
    if not layers and not prepared.others:
        raise prepared.no_layer([*skips, *prepared.unconverted])
    return replace(prepared, layers=layers)


def _left_out(prepared: Prepared, request: OptimizeRequest) -> Iterator[str]:
    """Say what is not in the forecast."""
    if request.budget is not None:
        yield f"{request.budget.text}: sensitivities are measured first, and the result may be made more than once"
    if request.workers is not None:
        yield f"workers {request.workers}: it is the time of this process alone"
    if request.device is not HOST:
        yield f"device {request.device.name}: it is the time of this machine's CPU"
    if request.validation is not None:
        yield "the comparison on validation data comes on top"
    mixtures = len(_mixtures(prepared))
    if others := len(prepared.others) - mixtures:
        yield f"{others} convolutions, recurrent operators or tables are written too: sizes and passes of these are not in it"
    if mixtures and prepared.data is not None:
        yield f"{mixtures} mixtures of experts: the passes over the data that gather their tokens are not in it"


def product_rate() -> float:
    """Measure floating-point operations a second in products of float32 on all threads."""
    a = np.random.default_rng(0).standard_normal((PRODUCT, PRODUCT), np.float32)
    best = min(_seconds(lambda: threads.product(a, a)) for _ in range(5))
    return 2 * PRODUCT**3 / best


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _rows(prepared: Prepared, context: RunContext) -> dict[str, int]:
    """Rows of what layers read over all data, by the name of the value, from the shapes in the first batch; of bodies as of the model."""
    data = prepared.data
    if data is None:
        return {}
    first = next(iter(data))
    whole = len(data) * max((math.prod(np.shape(array)[:2]) for array in first.values()), default=1)
    names = list(dict.fromkeys(layer.reads for layer in prepared.layers if not layer.nested))
    rows = dict.fromkeys((layer.reads for layer in prepared.layers), whole)
    if names and not context.memory.large:
        shapes = first_shapes(prepared.model, names, data, context.provider)
        rows |= {name: len(data) * math.prod(shape[:-1]) for name, shape in shapes.items()}
    return rows


@dataclass(frozen=True, slots=True)
class _Passes:
    """Times of the float model.

    Attributes:
        batch: Seconds of one batch of the calibration data.
        check: Seconds of comparing the models.
    """

    batch: float
    check: float

    @staticmethod
    def timed(prepared: Prepared, rows: Mapping[str, int], rate: float, context: RunContext) -> _Passes:
        """Time the first batch, or estimate it by its products where the model is too large to run as a whole."""
        data = prepared.kept_back or prepared.data
        if data is None:
            return _Passes(0.0, 0.0 if context.memory.large else CHECK_SECONDS)
        if context.memory.large:
            products = sum(2 * rows[layer.reads] * layer.k * layer.n for layer in prepared.layers)
            return _Passes(products / len(data) / rate, 0.0)
        with Session(prepared.reference, context.provider) as session:
            first = next(iter(data))
            session.run(first)
            batch = min(_seconds(partial(session.run, first)) for _ in range(3))  # the first allocates
        few_batches = some_for(prepared.model, data)
        return _Passes(batch, 2 * len(few_batches) * batch + CHECK_SECONDS + CHECK_PASSES * batch)

    def calibration(self, prepared: Prepared, rows: Mapping[str, int], products: Mapping[str, int], rate: float) -> dict[str, float]:
        """Estimate the time of passes over the data, up to the last layer that is converted, and of Gram matrices.

        Args:
            prepared: The model, with the layers that are converted.
            rows: Rows of what these read, by the name of the value.
            products: Multiplications of all linear layers, those that stay float among them, by name.
            rate: Floating-point operations a second.
        """
        if prepared.data is None:
            return {}
        outputs = {value.name for value in prepared.model.graph.outputs}
        inner = sum(products[layer.name] for layer in prepared.layers if layer.output.name not in outputs)
        share = inner / max(sum(products.values()), 1)
        plan, whole = prepared.plan, self.batch * len(prepared.data)
        sums = sum(min(rows[name], k) * rows[name] * k for name, k in {layer.reads: layer.k for layer in prepared.layers}.items())
        feedback = plan.error_feedback is not None
        seconds = {"ranges": RANGES * whole} if plan.activations is not None else {}
        seconds |= {"differentiate": GRADIENTS * whole} if plan.output_hessian is not None else {}
        seconds |= {"tune": TUNING * plan.tuning.epochs * whole} if plan.tuning is not None else {}
        passes, operations, stages = (PASSES, PAIRED_SUMS, len(rows)) if feedback else (1.0, SUMS, 0)
        return {**seconds, "calibrate": passes * share * whole + operations * sums / rate + STAGE * stages}


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A layer for a solver: its shape, the rows its inputs have, and the plan it is solved by."""

    k: int
    n: int
    rows: int
    plan: Plan


def _matrices(prepared: Prepared, rows: Mapping[str, int]) -> list[_Matrix]:
    """What solvers will work on: linear layers, convolutions that are no stacks of small groups, and experts."""
    plan = prepared.plan
    matrices = [_Matrix(layer.k, layer.n, rows.get(layer.reads, 0), plan) for layer in prepared.layers]
    convolutions = [layer for layer in prepared.others if isinstance(layer, ConvLayer) and layer.group == 1]
    if plan.convolutions is not None and convolutions:
        of_conv = plan.for_channels(plan.convolutions, absorbs=True)
        many = 0 if prepared.data is None else MANY_ROWS * MOST_INPUTS
        matrices += [_Matrix(layer.k, layer.n, many, of_conv) for layer in convolutions]
    for layer in _mixtures(prepared):
        of_experts, many = plan.for_experts(experts.block_of(plan, layer)), max(rows.values(), default=0) * layer.form.k // layer.experts
        matrices += [_Matrix(k, n, many, of_experts) for k, n in layer.shapes for _ in range(layer.experts)]
    return matrices


def _mixtures(prepared: Prepared) -> list[ExpertLayer]:
    return [layer for layer in prepared.others if isinstance(layer, ExpertLayer)]


def _solving(matrices: Sequence[_Matrix], samples: int | None, context: RunContext) -> float:
    """Measure solvers on one problem of every number of inputs, and add up what all layers would take."""
    kinds: dict[tuple[int, int, int], list[_Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault((matrix.k, min(matrix.rows, MANY_ROWS * matrix.k), id(matrix.plan)), []).append(matrix)
    total, steps = 0.0, context.stage("measuring solvers")
    for index, ((k, count, _), alike) in enumerate(kinds.items()):
        steps(index, len(kinds))
        size, plan = min(k, MOST_INPUTS), alike[0].plan
        stats = _made_up(size, -(-count * size // k), HoldOut.of(samples) if plan.holds_out or plan.error_feedback is not None else NONE)
        widest = max(matrix.n for matrix in alike)
        counts = (min(FEW_COLUMNS, widest), min(MANY_COLUMNS, widest))
        low, high = (_solve_seconds(plan, stats, n) for n in counts)
        of_column = max(high - low, 0.0) / (counts[1] - counts[0]) if counts[1] > counts[0] else low / counts[0]
        common = max(low - of_column * counts[0], 0.0)
        growth = k / size
        total += sum(common * growth**3 + of_column * matrix.n * growth**2 for matrix in alike)
    return total


def _solve_seconds(plan: Plan, stats: LayerStats, n: int) -> float:
    """Time the second of two solves: compiled loops, and what many layers share, are made in the first."""
    weight = 0.02 * np.random.default_rng(n).standard_normal((len(stats.mean), n), np.float32)
    activation = ActivationGrid.of_range(-4.0, 4.0) if plan.activations is not None else None
    problem = LayerProblem(weight, None, stats, activation=activation)
    if plan.output_hessian is not None and plan.output_hessian.kind == "adaptive":
        problem = replace(problem, adaptive_hessian=AdaptiveHessian(np.eye(len(weight) + 1), plan.output_hessian.share))
    elif plan.output_hessian is not None and n <= MAX_WIDTH:
        problem = replace(problem, output_hessian=np.eye(n))
    plan.solve(problem)
    return _seconds(lambda: plan.solve(problem))


def _made_up(k: int, rows: int, hold_out: HoldOut) -> LayerStats:
    """Statistics of correlated rows of different magnitudes, held out as those of a run are."""
    if not rows:
        return LayerStats.data_free(k)
    rng = np.random.default_rng(k)
    parts = Parts(hold_out, k, partial(MomentAccumulator, k, few=few(rows, k)))
    mixing, scale = rng.standard_normal((16, k), np.float32), np.exp(0.3 * rng.standard_normal(k)).astype(np.float32)
    for index in range(HELD_OUT):
        count = -(-rows // HELD_OUT)
        x: Array = (0.5 * rng.standard_normal((count, 16), np.float32) @ mixing + rng.standard_normal((count, k), np.float32)) * scale
        parts.of(index).add_rows(x, x)
    stats = split_stats(parts.sums, parts.folds, None)
    assert stats is not None
    return stats


def _memory(prepared: Prepared, rows: Mapping[str, int], context: RunContext) -> int:
    """Estimate the largest of what calibration, a solver and the comparison of models hold."""
    widest = max(prepared.layers, key=lambda layer: layer.k**2 + layer.k * layer.n, default=None)
    if widest is None:
        return BASE
    k, n = widest.k, widest.n
    solver = (4 if k >= 6144 else 8) * 4 * k * k * bool(rows) + 3 * 4 * k * n + 12 * (32 << 20)
    if context.memory.large:
        return BASE + max(solver, context.memory.gram_budget + context.memory.cache)
    grams = min(context.memory.gram_budget, sum({layer.reads: 24 * layer.k**2 for layer in prepared.layers}.values()))
    data = None if prepared.plan.tuning is None else prepared.data
    tunes = 0 if data is None else tuning.memory(prepared, data)
    return BASE + max(prepared.bytes + grams * bool(rows), solver + prepared.bytes // 2, 2 * prepared.bytes, tunes)
