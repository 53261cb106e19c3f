"""One converted layer, as plain data for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One converted layer.

    Attributes:
        name: Node name.
        op: MatMul, Gemm, Conv or ConvTranspose.
        weight: Initializer name.
        k: Input width.
        n: Output width.
        bits: Code width; None where the weight stayed float (MagR alone).
        block_size: Rows that share a scale; of a table values of a row.
        rows: Calibration rows behind the statistics; 0 for data-free.
        error: Root mean square of the difference between the layer's output in the quantized and in the float model, over the standard
            deviation of that in the float model (`measured`); ``estimate`` where the models were not run, and until they are.
        magr: Iterations and magnitudes of MagR, if it ran.
        solver: Figures of the quantizer, if it has any: sweeps, layer error before and after them.
        bias_compensated: Whether the bias absorbed the mean error.
        emitted: Name of the node that multiplies by the quantized weight.
        notes: Anything out of the ordinary.
        activation: How the input is quantized, if it is.
        feedback: Damping and held-out errors of error feedback, if it ran.
        low_rank: Rank of the low-rank branch, and the relative layer error without and with it, if there is one.
        groups: Matrices ``k x n`` of a convolution, one a group of channels.
        weights: Histograms of the weight before and after MagR, of its values and on its grid; see `magr_onnx.core.histograms.sketch`.
        errors: The quantizer's objective, at the start and after every sweep (at most 50).
        sweeps: The number of sweeps before each of ``errors``; empty in older reports, which have all of them.
        tiles: Headroom of a constrained accumulator along K; see `magr_onnx.core.histograms.tile_headroom`.
        depth: Converted layers before it on the longest path from the inputs.
        output: Name of its output, by which `Validation.layers` has it.
        scope: Path of its torch module, where known (`magr_onnx.passes.graph.torch_names`); ``@1`` and so on are appended to the second
            and later layers of one path.
        stored_block: Rows of the blocks it is stored in, where those are smaller than ``block_size``, so that scales are repeated.
        added: Bytes that it adds to the file, where its float weight stays in it for others.
        estimate: What ``error`` was expected to be when the layer was solved, after bias correction: on calibration rows that were held
            out, where there were some. After quantized layers their errors are in it where the quantizer corrected for them, else
            the rounding of the layer's own input. Where it mends a residual stream, the error of the sum. None in older reports.
        fitted_error: The estimate on the rows that the layer was solved from.
        measured: Whether ``error`` was measured in the running models.
    """

    name: str
    op: str
    weight: str
    k: int
    n: int
    bits: int | None
    block_size: int | None
    rows: int
    error: float | None
    magr: dict[str, Any] | None
    solver: dict[str, float] | None
    bias_compensated: bool
    emitted: str | None
    notes: tuple[str, ...] = ()
    activation: dict[str, Any] | None = None
    feedback: dict[str, Any] | None = None
    low_rank: dict[str, Any] | None = None
    groups: int = 1
    weights: dict[str, Any] | None = None
    errors: tuple[float, ...] = ()
    sweeps: tuple[int, ...] = ()
    tiles: dict[str, Any] | None = None
    depth: int | None = None
    output: str | None = None
    scope: str = ""
    stored_block: int | None = None
    added: int | None = None
    fitted_error: float | None = None
    estimate: float | None = None
    measured: bool = False

    @property
    def label(self) -> str:
        """Return its display name: its module, or the name of its node."""
        return self.scope or self.name

    @property
    def block(self) -> str:
        """Return the block that shares a scale: a number of rows, or ``channel``; of a table a number of values, or ``row``."""
        rows, name = (self.n, "row") if self.op == "Gather" else (self.k, "channel")
        return "" if self.block_size is None else name if self.block_size >= rows else str(self.block_size)


def with_measured(rows: Sequence[LayerRow], errors: Mapping[str, float], in_sample: bool) -> list[LayerRow]:
    """Fill in the errors that were measured in the running models.

    Errors on the samples that layers were solved from are too small for other samples. They are multiplied by the ratio of the estimates
    on held-out rows and on the rows solved from: the layer's own, or that of all layers up to it, whose errors are in what it reads.

    Args:
        rows: The layers.
        errors: Errors by the name of the layer's output (`magr_onnx.report.validation.LayerMetrics`).
        in_sample: Whether they are of samples that layers were solved from.
    """
    result = {}
    estimated = fitted = 0.0
    for index, row in sorted(enumerate(rows), key=lambda one: math.inf if one[1].depth is None else one[1].depth):
        factor = 1.0
        if row.estimate and row.fitted_error:
            estimated, fitted = estimated + row.estimate**2, fitted + row.fitted_error**2
            factor = row.estimate / row.fitted_error
        factor = max(1.0, factor, math.sqrt(estimated / fitted) if fitted else 1.0) if in_sample else 1.0
        error = errors.get(row.output or row.name)
        result[index] = row if error is None else replace(row, error=factor * error, measured=True)
    return [result[index] for index in range(len(rows))]


def with_unique_scopes(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """Make scopes unique by numbering repeated ones."""
    counts: dict[str, int] = {}
    unique = []
    for row in rows:
        count = counts[row.scope] = counts.get(row.scope, -1) + 1
        unique.append(replace(row, scope=f"{row.scope}@{count}") if row.scope and count else row)
    return unique
