"""What the adapters of other tools share. An adapter is one file: the methods of one tool, run in that tool's own environment.

    python ADAPTER                                              the tool's version and methods, as JSON
    python ADAPTER MODEL CALIBRATION OUTPUT BITS BLOCK METHOD   quantize

An adapter imports its tool inside its functions, and nothing of this package; ``tests/benchmarks`` must be on ``PYTHONPATH`` for
``common``, which needs numpy alone. What a tool writes to stderr last is the reason a failure is reported with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import NpzReader

if TYPE_CHECKING:
    import onnx


class Task(NamedTuple):
    """What to quantize: ``block`` rows of a column share a scale of a ``bits``-bit grid."""

    model: Path
    calibration: Path
    output: Path
    bits: int
    block: int

    def batches(self) -> list[dict[str, Any]]:
        """The calibration batches, the same ones our own quantizer reads."""
        return NpzReader(self.calibration).batches


class Rewindable(NpzReader):
    """A reader that tools may go through more than once."""

    def rewind(self) -> None:
        self.position = 0

    def get_first(self) -> dict[str, Any]:
        return self.batches[0]

    def __len__(self) -> int:
        return len(self.batches)


Method = Callable[[Task], None]


def only(bits: int, task: Task) -> None:
    """Stop where a tool has no other number of bits.

    Raises:
        SystemExit: The task asks for another.
    """
    if task.bits != bits:
        raise SystemExit(f"it writes {bits} bits only")


def save(model: onnx.ModelProto, task: Task) -> None:
    """Write ``model`` as one file."""
    import onnx

    onnx.save(model, str(task.output))


def at_opset(model: Path, least: int) -> onnx.ModelProto:
    """The model, converted to opset ``least`` where it is older (blocks in DequantizeLinear came with 21)."""
    import onnx
    from onnx.version_converter import convert_version

    loaded = onnx.load(str(model))
    if next(o.version for o in loaded.opset_import if o.domain == "") < least:
        loaded = convert_version(loaded, least)
        loaded.ir_version = max(loaded.ir_version, 10)
    return loaded


def padded(model: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """The same function with every weight's rows a multiple of ``block``: rows of zeros, and zeros behind the inputs they meet.

    For tools that leave ragged weights in float. It is what MatMulNBits does with its last block.
    """
    import numpy as np
    from onnx import helper, numpy_helper, shape_inference

    weights = {t.name: t for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and len(weight.dims) == 2 and (missing := -weight.dims[0] % block):
            array = np.pad(numpy_helper.to_array(weight), ((0, missing), (0, 0)))
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
            name = f"{node.output[0]}_padded"
            pads, axis = (numpy_helper.from_array(np.array(v, np.int64), name + s) for v, s in (([0, missing], "_pads"), ([-1], "_axis")))
            model.graph.initializer.extend([pads, axis])
            nodes.append(helper.make_node("Pad", [node.input[0], pads.name, "", axis.name], [name]))
            node.input[0] = name
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # shapes of the weights as they were, where there are any
    return shape_inference.infer_shapes(model)


def serve(package: str, methods: dict[str, Method]) -> None:
    """The program of an adapter; see the top of this file."""
    if len(sys.argv) == 1:
        print(json.dumps({"package": package, "version": version(package), "methods": list(methods)}))
        return
    model, calibration, output, bits, block, method = sys.argv[1:]
    methods[method](Task(Path(model), Path(calibration), Path(output), int(bits), int(block)))
