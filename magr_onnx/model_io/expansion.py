"""Sizes of constants that nodes expand to, without computing them: a node of a few bytes may expand to terabytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import uses_external_data

Array = npt.NDArray[Any]
Arrays = Sequence[Array | None]
Dims = Sequence[Sequence[int] | None]

_SMALL = 64
"""Most elements of a constant that may be a shape."""


def expanded_bytes(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> float | None:
    """Return a lower bound on the bytes a node expands constants to; None for other nodes.

    Args:
        node: Any node.
        constants: The valid constants of its graph, by value name.
    """
    make = _SIZES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if make is None:
        return None
    dims = [list(constants[name].dims) if name in constants else None for name in node.input]
    return make(node, [_small(constants.get(name)) for name in node.input], dims)


def _small(tensor: onnx.TensorProto | None) -> Array | None:
    """Return the flat values of a constant that may be a shape, else None."""
    if tensor is None or uses_external_data(tensor) or tensor.data_type == onnx.TensorProto.STRING or math.prod(tensor.dims) > _SMALL:
        return None
    return onnx.numpy_helper.to_array(tensor).astype(np.float64).reshape(-1)


def _of_shape(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    shape = arrays[0] if node.op_type == "ConstantOfShape" and arrays else arrays[1] if len(arrays) > 1 else None
    return None if shape is None else 4 * float(np.prod(np.maximum(shape, 1)))


def _tiled(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    if len(arrays) < 2 or arrays[1] is None or dims[0] is None:
        return None
    return 4 * float(np.prod(np.maximum(arrays[1], 1))) * math.prod(dims[0])


def _range(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    if len(arrays) != 3 or any(a is None or a.size != 1 for a in arrays):
        return None
    start, limit, step = (float(a[0]) for a in arrays if a is not None)
    return 4 * (limit - start) / step if step else None


def _random(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    return next((4 * float(np.prod(np.asarray(a.ints, np.float64))) for a in node.attribute if a.name == "shape"), None)


def _padded(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    if len(arrays) < 2 or arrays[1] is None or dims[0] is None or arrays[1].size != 2 * len(dims[0]):
        return None
    return 4 * float(np.prod(np.maximum(np.asarray(dims[0]) + arrays[1].reshape(2, -1).sum(axis=0), 1)))


def _one_hot(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    if len(arrays) < 2 or arrays[1] is None or arrays[1].size != 1:
        return None
    return 4 * float(arrays[1][0]) * math.prod(dims[0] or ())


def _outer(node: onnx.NodeProto, arrays: Arrays, dims: Dims) -> float | None:
    if len(dims) != 2 or not all(d is not None and len(d) == 2 for d in dims):
        return None
    (m, _), (_, n) = (d for d in dims if d is not None)
    return 4.0 * m * n


_SIZES = {
    **dict.fromkeys(("ConstantOfShape", "Expand"), _of_shape),
    **dict.fromkeys(("RandomNormal", "RandomUniform"), _random),
    "Tile": _tiled,
    "Range": _range,
    "Pad": _padded,
    "OneHot": _one_hot,
    "MatMul": _outer,
}
