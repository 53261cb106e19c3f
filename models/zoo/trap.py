"""What a trap is, and how its graph is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Tensor = npt.NDArray[Any]
Tensors = Mapping[str, Tensor]
CONVERTED = "converted"


@dataclass(frozen=True, slots=True)
class Trap:
    """A graph and what must become of it.

    Attributes:
        name: Unique in the zoo.
        build: Makes the model.
        feeds: Inputs for it.
        evaluate: The outputs, in order, of ``(feeds, weights)``: ``weights`` holds the matrix ``(K, N)`` of every converted layer, by
            name (of other operators what a reader of `magr_onnx.passes.emit.readback` says). Everything else it needs (biases, layers
            that are left alone) it takes from `constant`.
        layers: `CONVERTED`, or the text of the reason to leave it alone, for every linear layer by its name.
        options: Options of `magr_onnx.optimize` that the trap is about.
        refused: What the error says where the model as a whole must be refused.
    """

    name: str
    build: Callable[[], onnx.ModelProto]
    feeds: Callable[[np.random.Generator], dict[str, Tensor]]
    evaluate: Callable[[Tensors, Tensors], list[Tensor]]
    layers: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


def constant(name: str, *shape: int, dtype: npt.DTypeLike = np.float32) -> Tensor:
    """Random values that depend on the name and the shape only; of a size that keeps products near one."""
    seed = [*name.encode(), *shape]
    scale = 1 / np.sqrt(shape[-2]) if len(shape) > 1 else 1
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def model(text: str, *, opset: int = 17, ir_version: int = 8, domains: tuple[str, ...] = (), **initializers: Tensor) -> onnx.ModelProto:
    """A model from the textual form of its graph (and functions), and its initializers."""
    imports = ", ".join([f'"": {opset}', *(f'"{domain}": 1' for domain in domains)])
    proto = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]>\n{text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    return proto
