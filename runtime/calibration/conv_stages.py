"""Sequential calibration of convolutions: each is measured behind the quantized ones before it (`magr_onnx.runtime.calibration.staged`).

For every group of channels these are the moments of the patches ``P_q`` that the convolution reads in the model being quantized, and those
of its target output: the float model's ``Y = P W``, or, where its output is added to a value that carries an error, ``Y + R - R_q``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.moments import GroupSums, with_folds
from magr_onnx.core.types import LayerStats, TargetMoments
from magr_onnx.errors import NonFiniteError
from magr_onnx.passes.instrument.conv_patches import pair_taps
from magr_onnx.passes.instrument.segments import downstream, segments_of
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.moments import not_finite
from magr_onnx.runtime.calibration.staged import Values, lives_of
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.hold_out import HoldOut, Parts
from magr_onnx.runtime.ort.session import Session

Tensor = npt.NDArray[Any]


def staged(
    original: ir.Model, quantized: ir.Model, layers: Sequence[ConvLayer], context: CalibrationContext, changed: Collection[str], cache: int
) -> Iterator[tuple[ConvLayer, list[LayerStats], list[TargetMoments]]]:
    """Yield convolutions one by one, each with the statistics of its groups and, where batches could be held out, their target moments.

    The caller quantizes each in ``quantized`` before requesting the next one.

    Args:
        original: The float model.
        quantized: A copy of it, except for the ``changed`` values.
        layers: Convolutions of the main graph of ``quantized``, no two of one weight.
        context: Data and where to run.
        changed: Names of values that differ between the models from the beginning.
        cache: Bytes of live values in memory; the rest goes to a temporary folder.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    steps = segments_of(quantized, layers)
    with Cache(cache // 2) as floats, Cache(cache // 2) as quants:
        values = Values(original, quantized, context, floats, quants, downstream(quantized, changed))
        for s, (stage, live) in enumerate(zip(steps.stages, lives_of(original, steps), strict=True)):
            values.advance(live, feedback=True, first=s == 0)
            for layer in stage:
                yield layer, *_measure(layer, values, context)
            values.keep(live)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is named
def _measure(layer: ConvLayer, values: Values, context: CalibrationContext) -> tuple[list[LayerStats], list[TargetMoments]]:
    """Measure a convolution sample by sample: its patches are larger than its input by the number of taps."""
    name, groups, k, n = str(layer.x.name), layer.group, layer.k, layer.n
    residual = values.summand(layer)
    parts = Parts(HoldOut.of(context.data.samples), k, partial(GroupSums, groups, k, n))
    with Session(pair_taps(layer), context.provider) as session:
        for b in range(len(values)):
            x, x_q = values.pair(name, b)
            r, r_q = (None, None) if residual is None else values.pair(residual, b)
            for i in range(len(x)):
                patches, y = session.run({"first": x[i : i + 1], "second": x_q[i : i + 1]})
                if r is not None and r_q is not None and r[i : i + 1].shape == y.shape:
                    y = y + (r[i : i + 1] - r_q[i : i + 1]).astype(np.float32)
                parts.of(b).add(patches.reshape(groups, k, -1), y.reshape(groups, n, -1), context.data.weight(b))
    measured = list(zip(*(part.means() for part in parts.sums), strict=True))
    if not all(np.isfinite(stats.gram).all() and np.isfinite(target.cross).all() for of_group in measured for stats, target in of_group):
        raise NonFiniteError(not_finite(name, [layer], context.data.description))
    stats = [with_folds([s for s, _ in of_group], parts.folds) for of_group in measured]
    targets = [with_folds([t for _, t in of_group], parts.folds) for of_group in measured]
    return stats, targets if stats[0].folds else []
