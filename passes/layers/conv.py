"""Views of convolutions, and their weights as matrices.

A `ConvLayer` is a view of a Conv or ConvTranspose of any number of spatial axes whose weight is constant. With ``G`` groups it is ``G``
products ``Y_g = P_g W_g + b_g``: the rows of ``P_g (n, K)`` are the input patches of the output positions, ``K = C / G *``
the size of the kernel, and ``W_g (K, N)`` has ``N = M / G`` output channels. (``C`` and ``M`` count the channels of input and output.) A
ConvTranspose is the same with the patches of `magr_onnx.passes.instrument.conv_patches`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import constant_tensor, constant_view, dequantized, replace_input
from magr_onnx.passes.graph.nodes import layer_name, operand, producers
from magr_onnx.passes.graph.subgraphs import SubgraphPath
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import FLOATS, Product, find_views, in_closed_body, in_functions, refusal, skip_of
from magr_onnx.report.reasons import ConvReason, Reason, Skip

OPS = ("Conv", "ConvTranspose")
Form = Literal["fold", "dequantize", "integer", "integer-int4"]
FORMS: tuple[Form, ...] = ("fold", "dequantize", "integer")
BITS = tuple(range(3, 9))


@dataclass(frozen=True, slots=True, eq=False)
class ConvLayer(Product):
    """A safe view of one convolution. Its weight is ``(M, C / G, ...)``, or ``(C, M / G, ...)`` of a ConvTranspose.

    Attributes:
        takes_bias: Whether a bias could be written: False where one is computed at run time.
        group: ``G``.
    """

    takes_bias: bool
    group: int

    @property
    def groups(self) -> int:
        """Return ``G``."""
        return self.group

    @property
    def weight_key(self) -> Hashable:
        """Return a key that is equal for convolutions with the same matrices of one weight."""
        return (*self.weight.key, self.op, self.group)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the size of the kernel by axis."""
        return self.shape[2:]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return self.weight.shape

    @property
    def channels(self) -> int:
        """Return the number of input channels ``C``."""
        return self.shape[0] if self.op == "ConvTranspose" else self.shape[1] * self.group

    @property
    def k(self) -> int:
        """Return the rows of a group's matrix."""
        return self.channels // self.group * math.prod(self.kernel)

    @property
    def taps(self) -> int:
        """Return the number of consecutive rows that read one channel at neighbouring positions; 1 where others lie between these."""
        return math.prod(self.kernel) if self.op == "Conv" else 1

    @property
    def n(self) -> int:
        """Return the output channels of a group."""
        return self.shape[1] if self.op == "ConvTranspose" else self.shape[0] // self.group

    def read(self) -> Array:
        """Read the matrices ``(G, K, N)`` float32."""
        return to_matrices(self.weight.tensor().numpy().astype(np.float32), self.op, self.group)

    def read_bias(self) -> Array | None:
        """Read the bias ``(M,)`` float64, or None."""
        return None if self.bias is None else self.bias.numpy().astype(np.float64)

    def write(self, index: int, array: npt.NDArray[Any]) -> None:
        """Write the weight (input 1) or the bias (input 2) in the type of the weight; views made before keep the former one.

        An initializer that nothing else reads keeps its name.
        """
        former, array = operand(self.node, index), array.astype(FLOATS[self.dtype])
        if former is not None and former.is_initializer() and len(former.uses()) == 1 and not former.is_graph_output():
            former.const_value = ir.tensor(array, name=former.name)
        else:
            replace_input(self.node, index, self.constant("_folded" if index == 1 else "_bias", array))


def to_matrices(weight: npt.NDArray[Any], op: str, group: int) -> npt.NDArray[Any]:
    """Reshape a convolution's weight to ``(G, K, N)``; rows are ordered by channel, then kernel tap."""
    if op == "ConvTranspose":
        channels, n = weight.shape[:2]
        matrices = weight.reshape(group, channels // group, n, -1).transpose(0, 1, 3, 2)
        return np.ascontiguousarray(matrices.reshape(group, -1, n))
    return np.ascontiguousarray(weight.reshape(group, len(weight) // group, -1).transpose(0, 2, 1))


def split_groups(matrix: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """Split a matrix ``(K, G N)`` of all groups' channels side by side into ``(G, K, N)``."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), group, -1).transpose(1, 0, 2))


def from_matrices(matrices: npt.NDArray[Any], op: str, kernel: Sequence[int]) -> npt.NDArray[Any]:
    """Invert `to_matrices`."""
    group, k, n = matrices.shape
    inner = k // math.prod(kernel)
    if op == "ConvTranspose":
        weights = matrices.reshape(group, inner, -1, n).transpose(0, 1, 3, 2)
        return np.ascontiguousarray(weights.reshape(group * inner, n, *kernel))
    return np.ascontiguousarray(matrices.transpose(0, 2, 1).reshape(group * n, inner, *kernel))


def is_made_of_codes(value: ir.Value) -> bool:
    """Return whether a weight is computed from an integer constant, that is, dequantized in any form."""
    source: ir.Value | None = value
    for node in producers(value):
        if node.op_type not in ("Cast", "DequantizeLinear", "Mul", "Reshape", "Sub", "Transpose"):
            break
        source = operand(node, 0)
    tensor = constant_tensor(source)
    return tensor is not None and tensor.dtype.is_integer()


def view(node: ir.Node, path: SubgraphPath) -> ConvLayer | Skip:
    """View a Conv or ConvTranspose as a layer, or return the reason why it is none."""
    if (refused := in_closed_body(node, path)) is not None:
        return refused
    x, value = operand(node, 0), operand(node, 1)
    if x is None or value is None:
        return skip_of(node, ConvReason.SHAPE, "an input is missing")
    weight = constant_view(value)
    if weight is None:
        quantized = dequantized(value) is not None or is_made_of_codes(value)
        return skip_of(node, Reason.QUANTIZED if quantized else ConvReason.DYNAMIC_WEIGHT)
    if (refused := refusal(node, weight)) is not None:
        return refused
    group = node.attributes.get_int("group", 1)
    if len(weight.shape) < 3 or group < 1 or weight.shape[0] % group:
        return skip_of(node, ConvReason.SHAPE, f"weight {list(weight.shape)} in {group} groups")
    bias = constant_view(operand(node, 2))
    fixed = bias is not None and not bias.overridable
    takes_bias = fixed or operand(node, 2) is None
    return ConvLayer(layer_name(node), node, weight, bias.tensor() if bias is not None and fixed else None, takes_bias, group, path=path)


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[ConvLayer], list[Skip]]:
    """Find every convolution with a constant weight in the main graph and its subgraphs, and skips for the others; see `find_views`."""
    layers, skips = find_views(model, OPS, view, selection)
    return layers, skips + in_functions(model, OPS)
