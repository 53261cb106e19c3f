"""Low-rank error reconstruction as a pass: a small float branch beside the quantized product gives back what quantization lost most of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core import low_rank
from magr_onnx.core.linalg import automatic_damping
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.job import BiasPolicy, Job
from magr_onnx.passes.layer_passes.quantize import relative_error
from magr_onnx.passes.layers.linear import FLOATS


@dataclass(frozen=True)
class LowRank(LayerPass):
    """Add ``(x A) B`` to every layer (`magr_onnx.core.low_rank`): ``rank (K + N)`` more weights, in the layer's float type.

    Attributes:
        rank: Columns of A and rows of B; as many as the layer has at most.
        kind: ``exact`` (the whole Gram matrix) or ``diagonal``.
        bias: Policy of the bias compensation that will follow: where a bias will absorb the mean error, the centred Gram
            matrix is the objective. A plan fills it in from its compensate-bias pass; none where there is none.
    """

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "add a low-rank float branch that gives back quantization error (two small MatMuls a layer)"
    slot: ClassVar[str] = "low_rank"
    solves: ClassVar[bool] = True

    rank: int = 8
    kind: low_rank.Kind = "exact"
    bias: BiasPolicy | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        found = []
        if self.rank < 1:
            found.append(f"{self.name}: rank={self.rank} must be at least 1; leave the pass out for none")
        if self.kind not in ("exact", "diagonal"):
            found.append(f"{self.name}: kind={self.kind!r} is not known; choose one of exact, diagonal")
        if spec is None:
            found.append(f"{self.name} needs a quantize pass before it: there is no error to give back")
        return found

    def apply(self, job: Job) -> bool:
        if job.quantized is None or job.emitted:
            return False
        k, n = job.reference.shape
        rank, centred = min(self.rank, k, n), job.centred(self.bias)
        if rank < self.rank:
            job.notes.append(f"low-rank: a {k} x {n} layer has rank {rank} at most, not {self.rank}")
        damping = automatic_damping(k, job.stats.rows)
        key = ("low-rank", centred, damping, self.kind)
        root = job.stats.memo(key, lambda: low_rank.root(job.stats.objective_gram(centred), damping, self.kind))
        job.factors = low_rank.reconstruct(job.target - job.weight, root, rank).stored(FLOATS[job.layer.dtype])
        job.weight = job.weight + job.factors.product()
        job.changed = True
        before, after = job.facts.get("error"), relative_error(job, centred)
        job.facts["low_rank"] = {"rank": rank, "error_before": before, "error_after": after}
        job.facts["error"] = after
        return True
