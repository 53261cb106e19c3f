"""Low-rank error reconstruction as a pass: a small float branch beside the quantized product gives back what quantization lost most of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from magr_onnx.core import low_rank
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution, relative_error
from magr_onnx.core.linalg import automatic_damping
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import LayerPass


@dataclass(frozen=True)
class LowRank(LayerPass):
    """Add ``(x A) B`` to every layer (`magr_onnx.core.low_rank`): ``rank (K + N)`` more weights, in the layer's float type.

    Attributes:
        rank: Columns of A and rows of B; as many as the layer has at most.
        kind: ``exact`` (the whole Gram matrix) or ``diagonal``.
        bias: Policy of the bias compensation that follows, and so whether the centred Gram matrix is the objective; a plan fills it in.
    """

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "add a low-rank float branch that gives back quantization error (two small MatMuls a layer)"
    slot: ClassVar[str] = "low_rank"
    solves: ClassVar[bool] = True

    rank: int = 8
    kind: low_rank.Kind = "exact"
    bias: BiasPolicy | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = []
        if self.rank < 1:
            problems.append(f"{self.name}: rank={self.rank} must be at least 1; leave the pass out for none")
        if self.kind not in ("exact", "diagonal"):
            problems.append(f"{self.name}: kind={self.kind!r} is not known; choose one of exact, diagonal")
        if spec is None:
            problems.append(f"{self.name} needs a quantize pass before it: there is no error to give back")
        return problems

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        if solution.quantized is None:
            return solution
        stats, record = problem.stats, solution.record
        k, n = problem.weight.shape
        rank, centred = min(self.rank, k, n), problem.centred(self.bias)
        if rank < self.rank:
            record = record.noting(f"low-rank: a {k} x {n} layer has rank {rank} at most, not {self.rank}")
        damping = automatic_damping(k, stats.rows)
        key = ("low-rank", centred, damping, self.kind)
        root = stats.memo(key, lambda: low_rank.root(stats.regularized(centred), damping, self.kind))
        factors = low_rank.reconstruct(solution.target - solution.weight, root, rank).stored(problem.float_type)
        weight = solution.weight + factors.product()
        before, after = (relative_error(w, problem, centred) for w in (solution.weight, weight))
        error = None if record.error is None else record.error * (after / before if before else 1.0)  # on held-out rows, estimated
        record = replace(record, error=error, fitted_error=after, low_rank={"rank": rank, "error_before": before, "error_after": after})
        return replace(solution, weight=weight, factors=factors, changed=True, record=record)

    def placeholder(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        k, n = problem.weight.shape
        rank = min(self.rank, k, n)
        return replace(solution, factors=low_rank.Factors(np.zeros((k, rank), np.float32), np.zeros((rank, n), np.float32)))
