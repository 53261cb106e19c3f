"""Running an overflow witness, the dot product of a single column, in onnxruntime on this machine.

A machine with wider registers than the target's computes the exact result, which is recorded as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.overflow.proof import IntegerDot, KernelRegisters, Witness
from magr_onnx.core.packing import pack_bits
from magr_onnx.errors import RuntimeFailure
from magr_onnx.runtime.ort.session import Session

EXACT_FLOAT = 1 << 24  # integers up to this are exact in float32


@dataclass(frozen=True, slots=True)
class Execution:
    """Result of a witness on this machine.

    Attributes:
        operator: Operator that was run; empty if none could be.
        computed: Its result; None if it could not be run.
        exact: Whether the result is the true dot product.
        detail: Why it could not be run.
    """

    operator: str
    computed: int | None
    exact: bool | None
    detail: str = ""


def machine_name() -> str:
    """Name this machine: the result of a witness depends on it."""
    return f"{platform.system()} {platform.machine()}"


def run(dot: IntegerDot, machine: KernelRegisters, witness: Witness) -> Execution:
    """Compute the witness's column with the operator of the layer, or with MatMulInteger in the order and types of its kernel."""
    try:
        if dot.form == "blockwise":
            return _blockwise(dot, witness)
        if dot.weight_left:
            return _conv_integer(dot, witness)
        return _matmul_integer(dot, machine, witness)
    except RuntimeFailure as error:
        return Execution("", None, None, str(error))


def _byte(codes: npt.NDArray[np.int64], low: int, high: int) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8] | None:
    """Convert codes to the 8-bit type that holds ``low`` to ``high``; None if there is none."""
    if low >= 0 and high <= 255:
        return codes.astype(np.uint8)
    return codes.astype(np.int8) if low >= -128 and high <= 127 else None


def _type_range(kind: str) -> tuple[int, int]:
    bits = int(kind.lstrip("uint"))
    return (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _matmul_integer(dot: IntegerDot, machine: KernelRegisters, witness: Witness) -> Execution:
    """Run MatMulInteger on the codes in the kernel's order; int8 activations that fusion shifts to uint8 are shifted here too."""
    shift = machine.x_shift if dot.form == "qdq" and dot.x_range[0] < 0 <= dot.x_range[0] + machine.x_shift else 0
    x = _byte(witness.x + shift, dot.x_range[0] + shift, dot.x_range[1] + shift)
    w = _byte(dot.codes[:, witness.column].astype(np.int64), *_type_range(dot.w_type))
    if x is None or w is None:
        return Execution("", None, None, f"no operator multiplies {dot.x_type} by {dot.w_type}")
    rows = dot.channels_last() if dot.taps > 1 and not dot.depthwise else np.arange(dot.k)
    zero = (witness.x_zero if witness.claim == "result" else 0) + shift
    inputs: list[tuple[str, npt.NDArray[Any]]] = [("x", x[rows][None, :]), ("w", w[rows][:, None]), ("x_zero", np.array(zero, x.dtype))]
    if witness.claim == "result" and dot.w_zeros is not None:
        inputs.append(("w_zero", np.array([dot.w_zeros[0, witness.column]], w.dtype)))
    offset = 0
    if dot.bias is not None and witness.claim != "inner":
        # the witness's sum may include the bias
        levels = dot.codes[:, witness.column].astype(np.int64)
        if witness.claim == "result" and dot.w_zeros is not None:
            levels -= dot.w_zeros[:, witness.column]
        offset = witness.dot - int((witness.x - witness.x_zero) @ levels)
    return _compare("MatMulInteger", "", inputs, {}, witness, offset)


def _conv_integer(dot: IntegerDot, witness: Witness) -> Execution:
    x = _byte(witness.x, *dot.x_range)
    w = _byte(dot.codes[:, witness.column].astype(np.int64), *_type_range(dot.w_type))
    if x is None or w is None:
        return Execution("", None, None, f"no operator multiplies {dot.x_type} by {dot.w_type}")
    shape = (1, -1, dot.taps)
    zero = witness.x_zero if witness.claim == "result" else 0
    inputs: list[tuple[str, npt.NDArray[Any]]] = [("x", x.reshape(shape)), ("w", w.reshape(shape)), ("x_zero", np.array(zero, x.dtype))]
    if witness.claim == "result" and dot.w_zeros is not None:
        inputs.append(("w_zero", np.array(dot.w_zeros[0, witness.column], w.dtype)))
    return _compare("ConvInteger", "", inputs, {"kernel_shape": [dot.taps]}, witness)


def _blockwise(dot: IntegerDot, witness: Witness) -> Execution:
    """Run MatMulNBits with scales of one: activations whose largest magnitude is 127 are quantized to themselves."""
    block = dot.block or dot.k
    count = -(-dot.k // block)
    padded = np.zeros((1, count * block), np.uint8)
    padded[0, : dot.k] = dot.codes[:, witness.column]
    packed = pack_bits(padded.reshape(1, count, block), dot.bits)
    zeros = np.zeros((1, -(-count * dot.bits // 8)), np.uint8)
    inputs: list[tuple[str, npt.NDArray[Any]]] = [
        ("x", witness.x.astype(np.float32)[None, :]),
        ("w", packed),
        ("scales", np.ones((1, count), np.float32)),
        ("zeros", zeros),
    ]
    attributes = {"K": dot.k, "N": 1, "bits": dot.bits, "block_size": block, "accuracy_level": 4}
    if abs(witness.dot) > EXACT_FLOAT:
        return Execution("", None, None, "the sum is not exact in float32")
    return _compare("MatMulNBits", "com.microsoft", inputs, attributes, witness)


def _compare(
    op: str,
    domain: str,
    inputs: Sequence[tuple[str, npt.NDArray[Any]]],
    attributes: Mapping[str, int | list[int]],
    witness: Witness,
    offset: int = 0,
) -> Execution:
    """Run one node with its first input fed and the others constant, and add ``offset`` to its result in 32 bits."""
    values = []
    name, first = inputs[0]
    kind = ir.DataType.from_numpy(first.dtype)
    fed_input = ir.val(name, kind, first.shape)
    for name, array in inputs[1:]:
        tensor = ir.tensor(array, name=name)
        values.append(ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor))
    node = ir.node(op, [fed_input, *values], attributes, domain=domain, name="witness")
    out = node.outputs[0]
    out.name, out.dtype = "y", kind if domain else ir.DataType.INT32
    graph = ir.Graph([fed_input], [out], nodes=[node], initializers=values, opset_imports={"": 17, "com.microsoft": 1}, name="witness")
    with Session(ir.Model(graph, ir_version=8), threads=1) as session:
        computed = int(session.run({"x": first})[0].reshape(-1)[0])
    if offset:
        computed = (computed + offset + 2**31) % 2**32 - 2**31
    return Execution(op, computed, computed == witness.dot)
