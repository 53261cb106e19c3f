"""What is checked before any work, and proved of a result before it is handed over: its codes, its accumulators, and that it loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from magr_onnx.core.checks import check_finite, check_weight
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import Target
from magr_onnx.errors import MagrError, ModelError, NonFiniteError, OptionError, RuntimeFailure, raise_all
from magr_onnx.model_io import legacy
from magr_onnx.model_io.writing import data_files
from magr_onnx.passes import LinearLayer, Plan
from magr_onnx.passes.emit.readback import digest, iterate_weights
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.embedding import EmbeddingTable
from magr_onnx.passes.layers.experts import ExpertLayer
from magr_onnx.passes.layers.recurrent import RecurrentLayer
from magr_onnx.report.data import ProofSummary, versions
from magr_onnx.report.reasons import IntegerReason
from magr_onnx.report.verification import LayerVerdict
from magr_onnx.runtime.measure import overflow
from magr_onnx.runtime.ort import session, worker
from magr_onnx.runtime.ort.session import Weights

LARGE = 1 << 29  # bytes of a file from which loading it to prove that it loads makes no copies of its weights


def check_weights(layers: Sequence[LinearLayer | ConvLayer | RecurrentLayer | ExpertLayer | EmbeddingTable]) -> None:
    """Name every layer with NaN or infinite weights or bias, before any work."""
    problems = []
    for layer in layers:
        try:
            for part in layer.parts():
                check_weight(f"weight of {layer.name}", part)
        except NonFiniteError as error:
            problems.append(str(error))
        try:
            if (bias := layer.read_bias()) is not None:
                check_finite(f"bias of {layer.name}", bias)
        except NonFiniteError as error:
            problems.append(str(error))
    raise_all(NonFiniteError, problems)


def prove(model: ir.Model, demand: Target | Accumulator, emitted: set[str]) -> ProofSummary:
    """Prove that the nodes just written cannot overflow; those that were integers before are counted, not answered for.

    Raises:
        OptionError: A layer does not fit a register (all such layers); most are too long for the outer one.
        MagrError: A node that was written is not among those that were read.
    """
    layers, skipped = overflow.verify(model, demand, run=False)
    against = f"target {demand.name}" if isinstance(demand, Target) else f"accumulator of {demand}"
    failing = [layer for layer in layers if layer.verdict != "proved" and layer.name in emitted]
    raise_all(OptionError, (f"{_overflow(layer)} ({against})" for layer in failing))
    unread = emitted - {layer.name for layer in layers} - {row.name for row in skipped if row.reason == IntegerReason.FLOAT}
    if unread:
        raise MagrError(f"internal error: the proof has not found {', '.join(sorted(unread))}; please report this")
    room = min((layer.headroom for layer in layers), default=math.inf)
    proved = sum(layer.verdict == "proved" for layer in layers)
    rooms = {layer.name: layer.headroom for layer in layers if math.isfinite(layer.headroom)}
    return ProofSummary(against, proved, len(layers), None if math.isinf(room) else room, len(skipped), rooms)


def _overflow(layer: LayerVerdict) -> str:
    """Which register of a layer is too narrow."""
    claim = next(c for c in (layer.inner, layer.outer, layer.result) if c is not None and not c.holds)
    where = "in a tile" if claim is layer.inner else "where the tiles are summed"
    return f"{layer.name} ({layer.k} x {layer.n}) needs {claim.needed} bits {where}, and there are {claim.bits}; exclude it"


def stamp(model: ir.Model, plan: Plan, proof: ProofSummary | None) -> None:
    """Say in the model's metadata what was done to it."""
    if proof is not None:
        model.metadata_props["onnx_magr.accumulator"] = str(proof)
    model.metadata_props["onnx_magr.pipeline"] = str(plan)
    model.metadata_props["onnx_magr.version"] = versions()["onnx-magr"]


def verify_codes(model: ir.Model, digests: dict[str, str]) -> None:
    """Read every emitted weight back and compare it with what was chosen."""
    written = {name: digest(weight) for name, weight in iterate_weights(model, digests)}
    wrong = [name for name, expected in digests.items() if written.get(name) != expected]
    if wrong:
        raise MagrError(f"internal error: the emitted weights of {', '.join(wrong)} are not those that were chosen; please report this")


def verify_file(
    path: Path, digests: dict[str, str], provider: str, demand: Target | Accumulator | None, emitted: set[str], source: ir.Model | Path
) -> None:
    """The file holds the chosen codes, they cannot overflow if that was asked for, and onnxruntime loads it.

    Raises:
        ModelError: onnxruntime crashes on the ``source``.
        RuntimeFailure: onnxruntime does not load the ``source`` either.
        MagrError: The result is not what was chosen, or does not load although the source does.
    """
    model = legacy.read(path)
    verify_codes(model, digests)
    if demand is not None:
        proof = prove(model, demand, emitted)
        if str(proof) != model.metadata_props["onnx_magr.accumulator"]:
            raise MagrError(f"internal error: the file says {model.metadata_props['onnx_magr.accumulator']}, but has {proof}")
    name = session.available_provider(provider).onnxruntime  # the worker has no providers but those of the package
    size = path.stat().st_size + sum(file.stat().st_size for file in data_files(path))
    try:
        with worker.as_file(path) as file:
            weights = Weights.MAPPED if size > LARGE else Weights.PACKED
            worker.run_in_worker(session.load, size, path=file, provider=name, weights=weights)
        return
    except (RuntimeFailure, worker.WorkerCrashed) as error:
        result = error
    try:
        with worker.as_file(source) as file:
            worker.run_in_worker(session.load, size, path=file, provider=name, weights=Weights.MAPPED)
    except worker.WorkerCrashed as error:
        raise ModelError(f"{error} while it loaded the model itself; nothing was written") from error
    raise MagrError(
        f"{result}; the model itself loads: if it declares shapes that its values do not have, remove them, else please report this"
    ) from result
