"""Overflow proof of a model: every integer dot product against the registers that accumulate it."""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.kernels import on_accumulator, on_target
from magr_onnx.core.overflow.proof import IntegerDot, KernelRegisters, Proof, prove
from magr_onnx.core.overflow.targets import Target
from magr_onnx.passes.integer.dot_products import find
from magr_onnx.report.data import SkipRow
from magr_onnx.report.reasons import IntegerReason, Skip
from magr_onnx.report.verification import LayerVerdict, WitnessRow
from magr_onnx.runtime.measure import witness as witnesses


def verify(
    model: ir.Model, against: Target | Accumulator, outer_bits: int | None = None, run: bool = True
) -> tuple[tuple[LayerVerdict, ...], tuple[SkipRow, ...]]:
    """Prove or refute that every integer dot product fits its accumulators.

    Args:
        model: The model; it is not changed.
        against: A target machine, or accumulator registers.
        outer_bits: Width of the outer register on a target; None for the target's own.
        run: Whether to run one witness per failing layer in onnxruntime.

    Returns:
        Verdicts of the dot products, and the nodes that are none or cannot be read.
    """
    layers: list[LayerVerdict] = []
    skipped: list[SkipRow] = []
    for dot in find(model):
        if isinstance(dot, Skip):
            skipped.append(SkipRow(dot.name, dot.op, dot.reason.value, dot.detail))
            continue
        machine = on_accumulator(dot, against) if isinstance(against, Accumulator) else on_target(dot, against, outer_bits)
        if isinstance(machine, str):
            skipped.append(SkipRow(dot.name, dot.op, IntegerReason.TARGET.value, machine))
        else:
            layers.append(_verdict(dot, machine, prove(dot, machine), run))
    return tuple(layers), tuple(skipped)


def _verdict(dot: IntegerDot, machine: KernelRegisters, proof: Proof, run: bool) -> LayerVerdict:
    shift = machine.x_shift
    return LayerVerdict(
        dot.name,
        dot.op,
        dot.weight,
        dot.k,
        dot.n,
        dot.x_type,
        dot.w_type,
        (dot.x_range[0] + shift, dot.x_range[1] + shift),
        str(machine.accumulator),
        machine.label,
        proof.inner,
        proof.outer,
        proof.result,
        "proved" if proof.holds else "overflows",
        _witness(dot, machine, proof, run),
    )


def _witness(dot: IntegerDot, machine: KernelRegisters, proof: Proof, run: bool) -> WitnessRow | None:
    w = proof.witness
    if w is None:
        return None
    execution = witnesses.run(dot, machine, w) if run else witnesses.Execution()
    x = tuple(w.x.tolist())
    return WitnessRow(w.claim, w.column, w.rows, x, w.x_zero, w.exact, w.wrapped, w.dot, w.simulated, *execution)
