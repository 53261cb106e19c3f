"""An operator that several nodes of a graph stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from magr_onnx.core.types import Array

OPSETS = {"HardSigmoid": 6, "HardSwish": 14, "LayerNormalization": 17, "Gelu": 20, "RMSNormalization": 23}
"""Opset of ONNX from which there is an operator."""


@dataclass(frozen=True, slots=True, eq=False)
class Compound:
    """An operator in several nodes.

    Attributes:
        root: The last of them, which puts out the result.
        operator: The operator.
        x: What it reads.
        constants: What else it reads, in order, by what that is.
        attributes: Its attributes.
    """

    root: ir.Node
    operator: str
    x: ir.Value
    constants: Mapping[str, Array] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
