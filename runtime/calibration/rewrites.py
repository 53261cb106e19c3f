"""Running a pipeline's rewrites on the float model, with statistics gathered only where one asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.layer_passes.bias_compensation import CompensateBias
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.pipeline import activations_of, resolve, spec_of
from magr_onnx.passes.rewrites.base import Context, Groups, Rewrite
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches


def rewrites_of(passes: Sequence[LayerPass]) -> list[Rewrite]:
    """The rewrites of a pipeline, in order."""
    return [p for p in passes if isinstance(p, Rewrite)]


def rewrite(
    model: ir.Model,
    passes: Sequence[LayerPass],
    data: Batches | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    gram_budget: int = moments.DEFAULT_BUDGET,
) -> list[str]:
    """Run the rewrites of a pipeline on ``model``, in place; what each did, or that it did nothing, for the report.

    Args:
        model: The float model.
        passes: The whole pipeline: rewrites are made for its grid and its bias compensation.
        data: Batches that fit the model; None for none.
        include: Patterns of the layers that will be converted.
        exclude: Patterns of those that will not.
        mask: See `magr_onnx.runtime.calibration.moments.collect`.
        provider: Where to run.
        gram_budget: Bytes of Gram matrices held at a time.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """

    def statistics(current: ir.Model, layers: Sequence[LinearLayer]) -> Groups:
        for group in moments.plan(layers, gram_budget):
            yield group, {} if data is None else moments.collect(current, group, CalibrationContext(data, mask, provider)).stats

    bias = next((p.bias for p in passes if isinstance(p, CompensateBias)), None)
    integer = activations_of(passes) is not None
    context = Context(spec_of(resolve(passes)) or Context().spec, bias, integer, include, exclude, statistics)
    notes: list[str] = []
    for p in rewrites_of(passes):
        notes += p.rewrite(model, context) or [f"{p.name} changed nothing: no layer meets its conditions and gains by it"]
    return notes
