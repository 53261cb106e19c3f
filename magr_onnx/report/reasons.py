"""Reasons why nodes with weights are not converted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Reasons why an operator with weights is not converted."""

    DYNAMIC_WEIGHT = "right side is computed at run time"
    QUANTIZED = "weight is quantized already"
    CONSTANT_LEFT = "the constant is on the left side"
    CONSTANT = "both sides are constant"
    WEIGHT_RANK = "weight is not two-dimensional"
    WEIGHT_DTYPE = "weight type is not float32 or float16"
    OVERRIDABLE = "weight is a graph input that a caller may override"
    GRAPH_OUTPUT = "weight is a graph output"
    TRANS_A = "Gemm transposes its input"
    BIAS = "Gemm bias is not a constant vector"
    ALPHA = "Gemm alpha is zero or not finite"
    SUBGRAPH = "inside a subgraph or function"
    EXCLUDED = "excluded by name"
    NOT_INCLUDED = "not among the layers to include"
    EMPTY = "weight has no elements"
    EINSUM = "an Einsum that is no product with a constant matrix"
    FUSED = "a fused operator that no format can replace"
    RECURRENT = "a recurrent operator (option recurrent quantizes its weights)"
    OTHER = "an operator without a quantized form"
    NO_STATISTICS = "there are no statistics of its input"
    SHARED = "its float weight would stay in the file for others"
    GROWS = "quantized it would take more bytes than in float"
    BUDGET = "kept float by the budget of size or loss"
    GAIN = "holds the gain of a norm between rotations, which a coarse grid would lose"


class ConvReason(StrEnum):
    """Reasons why a convolution is not converted, besides those shared with linear layers."""

    DYNAMIC_WEIGHT = "weight is computed at run time"
    UNASKED = "convolutions stay float (conv_bits gives them bits)"
    OPSET = "the model's opset cannot be raised as far as a quantized convolution needs"
    SHAPE = "shapes do not fit"


class TableReason(StrEnum):
    """Reasons why an embedding table is not converted, besides those shared with linear layers."""

    UNASKED = "tables of embeddings stay float (option embeddings quantizes them)"
    AXIS = "rows are not gathered along axis 0"
    WIDTH = "an odd number of columns has no 4-bit form"


class RecurrentReason(StrEnum):
    """Reasons why a recurrent operator is not converted, besides those shared with linear layers."""

    DYNAMIC_WEIGHT = "recurrent weights are computed at run time"
    OPSET = "the model's opset cannot be raised as far as a recurrent operator with this form needs"
    SHAPE = "shapes of recurrent weights do not fit"


class ExpertReason(StrEnum):
    """Reasons why experts are not converted, besides those shared with linear layers."""

    DYNAMIC_WEIGHT = "weights or biases of experts are computed at run time"
    SHAPE = "shapes of experts do not fit"
    ACTIVATION = "onnxruntime's kernel for CPUs has no such experts"
    FORMAT = "experts are quantized in format matmulnbits only"
    PROVIDER = "experts are quantized for provider cpu only"
    ACCUMULATOR = "accumulators of experts are not proved"
    ROUTER = "decides which experts see a token (include it to convert it all the same)"


class IntegerReason(StrEnum):
    """Reasons why a node is not proved."""

    FLOAT = "computed in float"
    DYNAMIC_WEIGHT = "weight is computed at run time"
    CONSTANT_LEFT = "the constant is on the left side"
    OVERRIDABLE = "weight is a graph input that a caller may override"
    WEIGHT_TYPE = "weight type is not an integer of up to 16 bits"
    ACTIVATION_TYPE = "activation type is unknown or not an integer of up to 16 bits"
    ZERO_POINT = "a zero point is missing or not constant"
    SCALE = "a scale is not constant, or not one a tensor or channel"
    BIAS = "the integer bias is not constant"
    SHAPE = "shapes do not fit"
    ATTRIBUTE = "an attribute is given by the function's caller"
    FUNCTION = "depends on inputs of a function"
    OPERATOR = "operator is not analysed"
    TARGET = "not an integer dot product on this target"


@dataclass(frozen=True, slots=True)
class Skip:
    """A node that was not converted, or neither proved nor refuted, with the reason and the bytes of its weights where known.

    ``scope`` is the path of its torch module, where known.
    """

    name: str
    op: str
    reason: str
    detail: str = ""
    bytes: int = 0
    scope: str = ""

    @property
    def label(self) -> str:
        """Return its display name: nodes of one module differ by their names."""
        return f"{self.scope} ({self.name})" if self.scope else self.name

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {self.reason}" + (f" ({self.detail})" if self.detail else "")
