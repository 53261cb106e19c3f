"""Overflow proof of a model: every integer dot product against the registers that accumulate it.

Witnesses of failing layers, the dot product of a single column, are run in onnxruntime on this machine. A machine with wider registers
than the target's computes the exact result, which is recorded as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.kernels import on_accumulator, on_target
from magr_onnx.core.overflow.proof import IntegerDot, KernelRegisters, Proof, Witness, prove
from magr_onnx.core.overflow.targets import Target
from magr_onnx.core.packing import pack_bits
from magr_onnx.errors import RuntimeFailure
from magr_onnx.passes.integer.dot_products import find
from magr_onnx.report.reasons import IntegerReason, Skip
from magr_onnx.report.verification import LayerVerdict, Verdict, WitnessRow
from magr_onnx.runtime.ort.session import Session

EXACT_FLOAT = 1 << 24  # integers up to this are exact in float32


def verify(
    model: ir.Model, against: Target | Accumulator, outer_bits: int | None = None, run: bool = True
) -> tuple[tuple[LayerVerdict, ...], tuple[Skip, ...]]:
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
    skipped: list[Skip] = []
    for dot in find(model):
        if isinstance(dot, Skip):
            skipped.append(dot)
            continue
        machine = on_accumulator(dot, against) if isinstance(against, Accumulator) else on_target(dot, against, outer_bits)
        if isinstance(machine, str):
            skipped.append(Skip(dot.name, dot.op, IntegerReason.TARGET, machine))
        else:
            layers.append(_verdict(dot, machine, prove(dot, machine), run))
    return tuple(layers), tuple(skipped)


def _verdict(dot: IntegerDot, machine: KernelRegisters, proof: Proof, run: bool) -> LayerVerdict:
    x_range = dot.x_range[0] + machine.x_shift, dot.x_range[1] + machine.x_shift
    product = dot.name, dot.op, dot.weight, dot.k, dot.n, dot.x_type, dot.w_type, x_range
    verdict: Verdict = "proved" if proof.holds else "overflows"
    witness = _witness(dot, machine, proof, run)
    return LayerVerdict(*product, str(machine.accumulator), machine.label, proof.inner, proof.outer, proof.result, verdict, witness)


def _witness(dot: IntegerDot, machine: KernelRegisters, proof: Proof, run: bool) -> WitnessRow | None:
    w = proof.witness
    if w is None:
        return None
    execution = run_witness(dot, machine, w) if run else _Execution()
    x = tuple(w.x.tolist())
    return WitnessRow(w.claim, w.column, w.rows, x, w.x_zero, w.exact, w.wrapped, w.dot, w.simulated, *execution)


class _Execution(NamedTuple):
    """Result of a witness on this machine: its operator (empty if none was run), the sum, whether that is exact, and why none was run."""

    operator: str = ""
    computed: int | None = None
    exact: bool | None = None
    detail: str = ""


def machine_name() -> str:
    """Name this machine: the result of a witness depends on it."""
    return f"{platform.system()} {platform.machine()}"


def run_witness(dot: IntegerDot, machine: KernelRegisters, witness: Witness) -> _Execution:
    """Compute the witness's column with the operator of the layer, or with MatMulInteger in the order and types of its kernel."""
    try:
        return _blockwise(dot, witness) if dot.form == "blockwise" else _integer(dot, machine, witness)
    except RuntimeFailure as error:
        return _Execution(detail=str(error))


def _byte(codes: npt.NDArray[np.int64], low: int, high: int) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8] | None:
    """Convert codes to the 8-bit type that holds ``low`` to ``high``; None if there is none."""
    if low >= 0 and high <= 255:
        return codes.astype(np.uint8)
    return codes.astype(np.int8) if low >= -128 and high <= 127 else None


def _type_range(kind: str) -> tuple[int, int]:
    bits = int(kind.lstrip("uint"))
    return (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _integer(dot: IntegerDot, machine: KernelRegisters, witness: Witness) -> _Execution:
    """Run ConvInteger, or MatMulInteger in the kernel's order; int8 activations that fusion shifts to uint8 are shifted here too."""
    shift = machine.x_shift if dot.form == "qdq" and dot.x_range[0] < 0 <= dot.x_range[0] + machine.x_shift else 0
    codes = dot.codes[:, witness.column].astype(np.int64)
    x = _byte(witness.x + shift, dot.x_range[0] + shift, dot.x_range[1] + shift)
    w = _byte(codes, *_type_range(dot.w_type))
    if x is None or w is None:
        return _Execution(detail=f"no operator multiplies {dot.x_type} by {dot.w_type}")
    zero = (witness.x_zero if witness.claim == "result" else 0) + shift
    w_zeros = dot.w_zeros[:, witness.column] if witness.claim == "result" and dot.w_zeros is not None else None
    offset = 0
    if dot.bias is not None and witness.claim != "inner":  # the witness's sum may include the bias
        offset = witness.dot - int((witness.x - witness.x_zero) @ (codes if w_zeros is None else codes - w_zeros))
    constants = {"x_zero": np.array(zero, x.dtype)} | ({} if w_zeros is None else {"w_zero": np.array(w_zeros[0], w.dtype)})
    if dot.weight_left:
        inputs = {"x": x.reshape(1, -1, dot.taps), "w": w.reshape(1, -1, dot.taps), **constants}
        return _compare("ConvInteger", "", inputs, {"kernel_shape": [dot.taps]}, witness, offset)
    rows = dot.channels_last() if dot.taps > 1 and not dot.depthwise else np.arange(dot.k)
    return _compare("MatMulInteger", "", {"x": x[rows][None, :], "w": w[rows][:, None], **constants}, {}, witness, offset)


def _blockwise(dot: IntegerDot, witness: Witness) -> _Execution:
    """Run MatMulNBits with scales of one: activations whose largest magnitude is 127 are quantized to themselves."""
    block = dot.block or dot.k
    count = -(-dot.k // block)
    padded = np.zeros((1, count * block), np.uint8)
    padded[0, : dot.k] = dot.codes[:, witness.column]
    packed = pack_bits(padded.reshape(1, count, block), dot.bits)
    zeros = np.zeros((1, -(-count * dot.bits // 8)), np.uint8)
    x, scales = witness.x.astype(np.float32)[None, :], np.ones((1, count), np.float32)
    attributes = {"K": dot.k, "N": 1, "bits": dot.bits, "block_size": block, "accuracy_level": 4}
    if abs(witness.dot) > EXACT_FLOAT:
        return _Execution(detail="the sum is not exact in float32")
    return _compare("MatMulNBits", "com.microsoft", {"x": x, "w": packed, "scales": scales, "zeros": zeros}, attributes, witness)


def _compare(
    op: str, domain: str, inputs: Mapping[str, npt.NDArray[Any]], attributes: Mapping[str, Any], witness: Witness, offset: int = 0
) -> _Execution:
    """Run one node with its input ``x`` fed and the others constant, and add ``offset`` to its result in 32 bits."""
    x, *constants = (ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape) for name, array in inputs.items())
    for value in constants:
        value.const_value = ir.tensor(inputs[str(value.name)], name=value.name)
    node = ir.node(op, [x, *constants], attributes, domain=domain, name="witness")
    out = node.outputs[0]
    out.name, out.type = "y", x.type if domain else ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([x], [out], nodes=[node], initializers=constants, opset_imports={"": 17, "com.microsoft": 1}, name="witness")
    with Session(ir.Model(graph, ir_version=8), threads=1) as session:
        computed = int(session.run(inputs)[0].reshape(-1)[0])
    if offset:
        computed = (computed + offset + 2**31) % 2**32 - 2**31
    return _Execution(op, computed, computed == witness.dot)
