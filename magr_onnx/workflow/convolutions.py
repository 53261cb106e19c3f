"""Convolutions on their way through a pipeline, before its linear layers: patches gathered, groups solved, codes written.

A group of channels is a job like any linear layer. Groups that are many and small are solved together
(`magr_onnx.core.quantizers.batched`), and so are convolutions that share a weight: one solution under the moments of all their patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.core.histograms import places, sketch, thinned
from magr_onnx.core.linalg import automatic_damping, layer_error
from magr_onnx.core.packing import container_bits
from magr_onnx.core.quantizers import batched
from magr_onnx.core.quantizers.auto import usual_alpha
from magr_onnx.core.types import Array, QuantizedWeight, joined
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes import CompensateBias, Job, MagR, Plan, Quantize, Skip
from magr_onnx.passes.emit.conv import emit
from magr_onnx.passes.emit.readback import digest
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.job import BiasPolicy
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layers.conv import ConvLayer, find
from magr_onnx.passes.layers.shared import by_weight
from magr_onnx.report.data import LayerRow
from magr_onnx.report.reasons import ConvReason
from magr_onnx.runtime.calibration import conv_patches, moments
from magr_onnx.runtime.calibration.conv_patches import PatchStats
from magr_onnx.runtime.data.sources import Batches

_TOGETHER = ("auto", "comq", "gptq", "rtn")  # quantizers of which `grouped` is a form


@dataclass(slots=True, eq=False)
class Converted:
    """What was done to a model before its linear layers.

    Attributes:
        rows: A row of the report for everything that was converted.
        skips: What was left alone, and why.
        digests: Of the dequantized weights, by the name of the output.
        notes: Whatever else should be known.
    """

    rows: list[LayerRow] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Solution:
    """The weight of every group, what is added to the biases ``(M,)``, and figures for the report (see `LayerRow`)."""

    weights: list[QuantizedWeight]
    added: Array | None
    error: float
    values: dict[str, Any]
    magr: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    errors: Sequence[float] = ()


def wanted(model: ir.Model, plan: Plan) -> Convolutions | None:
    """The plan's demand on convolutions, if it has one, in the form that this model needs.

    Beside static integer activations it is DequantizeLinear: onnxruntime would fold the other, round the weight anew in its own way and
    compute the convolution in integers.
    """
    demand = plan.convolutions
    return replace(demand, form="dequantize") if demand is not None and _integer(model, plan) else demand


def _integer(model: ir.Model, plan: Plan) -> bool:
    return plan.input_grids == "static" or any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())


def look(model: ir.Model, plan: Plan, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[list[ConvLayer], list[Skip]]:
    """Convolutions that will be converted, and all others with the reason."""
    layers, skips = find(model, include, exclude)
    demand = wanted(model, plan)
    reason, detail = None, ""
    if demand is None:
        reason = ConvReason.UNASKED
    elif (needed := demand.opset(layers)) > (opset := model.opset_imports.get("", 0)):
        reason, detail = ConvReason.OPSET, f"from {opset} to {needed}; export it with a newer opset"
    if reason is None:
        return layers, skips
    return [], [*skips, *(Skip(layer.name, layer.op, reason, detail) for layer in layers)]


def convert(
    model: ir.Model,
    work: ir.Model,
    plan: Plan,
    data: Batches | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    provider: str = "cpu",
    gram_budget: int = moments.DEFAULT_BUDGET,
    patch_limit: int = conv_patches.PATCH_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Quantize the convolutions of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Args:
        model: The float model.
        work: Its copy.
        plan: The whole plan.
        data: Batches that fit the model; None works data-free.
        include: Patterns of what will be converted.
        exclude: Patterns of what will not.
        provider: Where to run.
        gram_budget: Bytes of Gram matrices held at a time.
        patch_limit: Bytes of one sample's patches; convolutions that need more are solved data-free, and the report says so.
        progress: Called with convolutions done and in total.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = look(work, plan, include, exclude)
    result = Converted(skips=skips)
    demand = wanted(model, plan)
    if demand is None or not layers:
        return result
    integer = _integer(model, plan)
    groups = by_weight(layers)
    ordered = [layer for unit in groups for layer in unit]
    unmeasured = {} if data is None else conv_patches.unmeasured(model, ordered, data, provider, patch_limit)
    left = iter(groups)
    gathered: dict[str, PatchStats | None] = {}
    unit = next(left, None)
    for group in conv_patches.plan(ordered, gram_budget):
        measured = [layer for layer in group if layer.name not in unmeasured]
        found: dict[str, PatchStats] = {}
        if data is not None and measured:
            try:
                found = conv_patches.collect(model, measured, data, provider=provider)
            except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about a copy with patches
                unmeasured |= dict.fromkeys((layer.name for layer in measured), conv_patches.cannot_gather(error))
        gathered |= {layer.name: found.get(layer.name) for layer in group}
        while unit is not None and all(layer.name in gathered for layer in unit):
            known = [stats for layer in unit if (stats := gathered.pop(layer.name)) is not None]
            _convert(unit, known, demand, plan, integer, unmeasured, result)
            unit = next(left, None)
            if progress is not None:
                progress(len(result.rows), len(ordered))
    order = {layer.name: i for i, layer in enumerate(layers)}
    result.rows.sort(key=lambda row: order[row.name])
    return result


def _convert(
    unit: Sequence[ConvLayer],
    known: Sequence[PatchStats],
    demand: Convolutions,
    plan: Plan,
    integer: bool,
    unmeasured: Mapping[str, str],
    result: Converted,
) -> None:
    """Solve and write one weight."""
    stats = None
    for other in known:
        stats = other if stats is None else stats.combine(other)
    policy = plan.bias_policy
    absorbs = stats is not None and (
        (policy == "any" and all(layer.takes_bias for layer in unit)) or (policy == "existing" and all(layer.has_bias for layer in unit))
    )
    solution = _solve(unit[0], stats, solver_of(plan, demand, absorbs), absorbs)
    biases = [_added(layer.read_bias(), solution.added) for layer in unit]
    names = [layer.weight_name for layer in unit]
    emit(unit, solution.weights, biases, demand.form, integer)
    written = digest(np.stack([w.dequantize() for w in solution.weights]))
    stored = container_bits(demand.bits)
    for layer, name in zip(unit, names, strict=True):
        notes = list(solution.notes)
        if layer.name in unmeasured:
            notes.append(unmeasured[layer.name])
        if len(unit) > 1:
            notes.append(f"one weight for {len(unit)} convolutions: one solution for all")
        if stored != demand.bits:
            notes.append(f"{demand.bits}-bit codes are stored in {stored} bits")
        result.digests[str(layer.output.name)] = written
        result.rows.append(
            LayerRow(
                layer.name,
                layer.op,
                name,
                layer.k,
                layer.n,
                demand.bits,
                layer.k,
                0 if stats is None else stats.rows,
                solution.error,
                solution.magr,
                None,
                solution.added is not None,
                layer.node.name,
                tuple(notes),
                groups=layer.group,
                weights=solution.values,
                errors=tuple(thinned(solution.errors)),
                sweeps=tuple(places(len(solution.errors))),
                output=layer.output.name,
                scope=scope_of(layer.node),
            )
        )


def _sketch(matrices: Array, weights: Sequence[QuantizedWeight]) -> dict[str, Any]:
    """Of all groups together, whose grids are a column each."""
    codes, scales, zeros = (np.hstack([getattr(w, part) for w in weights]) for part in ("codes", "scales", "zero_points"))
    return sketch(np.hstack(list(matrices)), None, QuantizedWeight(codes, scales, zeros, weights[0].spec))


def _added(bias: Array | None, added: Array | None) -> Array | None:
    return None if added is None else added if bias is None else bias + added


def solver_of(plan: Plan, demand: Convolutions, absorbs: bool) -> Plan:
    """What the plan is for convolutions: MagR, the quantizer, the bias."""
    bias: BiasPolicy | None = "any" if absorbs else None
    usual = usual_alpha(demand.bits, None)
    alpha = usual if demand.alpha is None else demand.alpha
    damping = None if plan.magr is None else plan.magr.damping
    quantize = plan.quantize
    assert quantize is not None
    method = "comq" if quantize.method.startswith("a2q") else quantize.method
    auto = method == "auto"
    chosen = replace(
        quantize,
        method=method,
        bits=demand.bits,
        block_size=None,
        symmetric=demand.symmetric,
        bias=bias,
        target=None,
        accumulator_bits=None,
        accumulator_tile=None,
        alpha=demand.alpha if auto else None,
        activation=None,
    )
    reduce = MagR(alpha, damping=damping, bias=bias) if alpha and not auto else None
    return Plan(magr=reduce, quantize=chosen, bias=CompensateBias("any") if absorbs else None)


def _solve(layer: ConvLayer, stats: PatchStats | None, plan: Plan, absorbs: bool) -> _Solution:
    matrices = layer.read()
    quantize = plan.quantize
    assert quantize is not None
    group, k, _ = matrices.shape
    if group >= batched.FEWEST_GROUPS and k <= batched.MOST_ROWS and quantize.method in _TOGETHER and quantize.beta is None:
        return _together(layer, matrices, stats, quantize, absorbs)
    return _one_by_one(matrices, layer, stats, plan, absorbs)


def _one_by_one(matrices: Array, layer: ConvLayer, stats: PatchStats | None, plan: Plan, absorbs: bool) -> _Solution:
    jobs: list[tuple[QuantizedWeight, Array | None, float, float]] = []
    facts: dict[str, Any] = {}
    trace: list[float] = []
    notes: dict[str, None] = {}
    for index, matrix in enumerate(matrices):
        job = Job.start(layer.matrix(matrix, None), None if stats is None else stats.of_group(index))
        for stage in plan.solving:
            stage.apply(job)
        assert job.quantized is not None
        gram = job.stats.objective_gram(absorbs)
        jobs.append((job.quantized, job.bias, layer_error(job.weight - matrix, gram), layer_error(matrix, job.stats.gram)))
        facts = job.facts
        trace = joined(trace, facts.get("errors", []))
        notes |= dict.fromkeys(job.notes)
    weights, biases, errors, powers = zip(*jobs, strict=True)
    added = np.concatenate(biases) if absorbs else None
    error = _relative(sum(errors), sum(powers))
    if len(matrices) > 1:
        facts = {"weights": _sketch(matrices, weights)}
    return _Solution(list(weights), added, error, facts["weights"], facts.get("magr"), tuple(notes), trace)


def _together(layer: ConvLayer, matrices: Array, stats: PatchStats | None, quantize: Quantize, absorbs: bool) -> _Solution:
    group, k, _ = matrices.shape
    whole = np.broadcast_to(np.eye(k), (group, k, k)) if stats is None else stats.gram
    gram = whole if stats is None else np.stack([stats.of_group(g).objective_gram(absorbs) for g in range(group)])
    rows = 0 if stats is None else stats.rows
    damping = automatic_damping(k, rows) if quantize.damping is None else quantize.damping
    used = gram * np.eye(k) if quantize.method == "rtn" else gram  # nearest codes are the best where inputs are uncorrelated
    found = batched.solve(matrices, used, quantize.spec(layer.dtype), damping, quantize.sweeps)
    difference = np.stack([w.dequantize() for w in found.weights]).astype(np.float64) - matrices
    error = float(np.einsum("gkn,gkn->", gram @ difference, difference))
    power = float(np.einsum("gkn,gkn->", whole @ matrices.astype(np.float64), matrices))
    added = None if not absorbs or stats is None else -np.einsum("gkn,gk->gn", difference, stats.mean).reshape(-1)
    return _Solution(found.weights, added, _relative(error, power), _sketch(matrices, found.weights))


def _relative(error: float, power: float) -> float:
    return float(np.sqrt(max(error, 0) / power)) if power > 0 else 0.0
