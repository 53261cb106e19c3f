"""GELU, HardSwish and HardSigmoid in several operators, for `magr_onnx.passes.canonical.compounds`.

Each is a polynomial of its input x and of a gate g, which is a function of a polynomial of x: exporters write the same polynomial in many
ways, so that it is the polynomials that are compared.

    GELU          y = x / 2 + x g / 2      g = erf(x / sqrt(2)), or tanh(sqrt(2 / pi) (x + 0.044715 x^3))
    HardSwish     y = x g / 6              g = clip(x + 3, 0, 6)
    HardSigmoid   y = g / 6                likewise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from magr_onnx.passes.canonical.compound import Compound
from magr_onnx.passes.canonical.norms import number
from magr_onnx.passes.canonical.rewriter import RewriteContext
from magr_onnx.passes.graph.constants import clip_bounds
from magr_onnx.passes.graph.nodes import operator_of

Polynomial = dict[tuple[int, int], float]
"""Coefficients by the exponents of x and of g."""

TOLERANCE = 2e-4
"""Relative difference of a coefficient from what it stands for: constants are written with four digits here and there."""
MOST_NODES = 12
"""Between x and the gate, and between the gate and the result."""
_TANH = math.sqrt(2 / math.pi)


@dataclass(frozen=True, slots=True)
class _Form:
    """An operator with a gate.

    Attributes:
        operator: What it is.
        gate: Operator of the gate.
        argument: Polynomial that the gate is of.
        result: Polynomial of x and the gate.
        attributes: Attributes of the operator.
    """

    operator: str
    gate: str
    argument: Polynomial
    result: Polynomial
    attributes: Mapping[str, Any] = field(default_factory=dict)


_HALVES: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
FORMS = (
    _Form("Gelu", "Erf", {(1, 0): math.sqrt(0.5)}, _HALVES),
    _Form("Gelu", "Tanh", {(1, 0): _TANH, (3, 0): 0.044715 * _TANH}, _HALVES, {"approximate": "tanh"}),
    _Form("HardSwish", "Clip", {(0, 0): 3.0, (1, 0): 1.0}, {(1, 1): 1 / 6}),
    _Form("HardSwish", "HardSigmoid", {(1, 0): 1.0}, {(1, 1): 1.0}),
    _Form("HardSigmoid", "Clip", {(0, 0): 3.0, (1, 0): 1.0}, {(0, 1): 1 / 6}, {"alpha": 1 / 6, "beta": 0.5}),
)


def ending_at(node: ir.Node, context: RewriteContext, operators: Collection[str]) -> Compound | None:
    """Return the operator whose result a node puts out, if there is one and it may be written."""
    if operator_of(node) not in ("Mul", "Div", "Add"):
        return None
    made = list(_made_of(node.outputs[0]))
    for form in FORMS:
        if form.operator not in operators:
            continue
        for gate in (value for value in made if _is_gate(value, form.gate)):
            inner = _first_input(gate)
            for x in (inner, *_made_of(inner)):
                if context.dtype(x) != ir.DataType.FLOAT or not _equal(_polynomial(inner, x, None), form.argument):
                    continue
                if _equal(_polynomial(node.outputs[0], x, gate), form.result):
                    return Compound(node, form.operator, x, {}, form.attributes)
    return None


def _made_of(value: ir.Value) -> Iterator[ir.Value]:
    """Yield what a value is computed from by the arithmetic of polynomials, and gates, nearest first."""
    waiting, seen = [value], {value}
    for _ in range(MOST_NODES):
        node = waiting.pop(0).producer() if waiting else None
        if node is None or operator_of(node) not in _ARITHMETIC:
            continue
        for each in node.inputs:
            if each is not None and each not in seen:
                seen.add(each)
                waiting.append(each)
                yield each


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Identity")


def _first_input(value: ir.Value) -> ir.Value:
    node = value.producer()
    assert node is not None
    assert node.inputs[0] is not None
    return node.inputs[0]


def _is_gate(value: ir.Value, kind: str) -> bool:
    node = value.producer()
    if node is None or operator_of(node) != kind:
        return False
    if kind == "Clip":
        return clip_bounds(node) == (0, 6)
    if kind == "HardSigmoid":
        alpha, beta = (node.attributes.get_float(name, default) for name, default in (("alpha", 0.2), ("beta", 0.5)))
        return abs(alpha * 6 - 1) < TOLERANCE and beta == 0.5
    return True


def _polynomial(value: ir.Value, x: ir.Value, gate: ir.Value | None, depth: int = MOST_NODES) -> Polynomial | None:
    """Return a value as a polynomial of ``x`` and ``gate``; None where it is none, or of a degree above 3."""
    if value is x or value is gate:
        return {(1, 0) if value is x else (0, 1): 1.0}
    if (constant := number(value)) is not None:
        return {(0, 0): constant}
    node = value.producer()
    if node is None or not depth or operator_of(node) not in _ARITHMETIC:
        return None
    parts = [_polynomial(each, x, gate, depth - 1) for each in node.inputs if each is not None]
    if None in parts:
        return None
    first, *others = (part for part in parts if part is not None)
    return _COMPUTED[operator_of(node)](first, *others)


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in a.keys() | b.keys()}


def _times(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product: Polynomial = {}
    for (i, j), u in a.items():
        for (more_i, more_j), v in b.items():
            key = i + more_i, j + more_j
            product[key] = product.get(key, 0.0) + u * v
    return None if any(i > 3 or j > 1 for i, j in product) else product


def _over(a: Polynomial, b: Polynomial) -> Polynomial | None:
    divisor = b.get((0, 0), 0.0)
    return None if len(b) != 1 or divisor == 0 else _scaled(a, 1 / divisor)


def _scaled(a: Polynomial, factor: float) -> Polynomial:
    return {key: value * factor for key, value in a.items()}


def _power(a: Polynomial, b: Polynomial) -> Polynomial | None:
    exponent = b.get((0, 0), 0.0) if len(b) == 1 else 0.0
    if exponent not in (1, 2, 3):
        return None
    result: Polynomial | None = a
    for _ in range(int(exponent) - 1):
        result = None if result is None else _times(result, a)
    return result


_COMPUTED: dict[str, Callable[..., Polynomial | None]] = {
    "Add": _sum,
    "Sub": lambda a, b: _sum(a, _scaled(b, -1)),
    "Mul": _times,
    "Div": _over,
    "Neg": lambda a: _scaled(a, -1),
    "Pow": _power,
    "Identity": lambda a: a,
}


def _equal(found: Polynomial | None, expected: Polynomial) -> bool:
    """Whether two polynomials are the same, but for how constants are written."""
    if found is None:
        return False
    return all(
        math.isclose(found.get(key, 0.0), expected.get(key, 0.0), rel_tol=TOLERANCE, abs_tol=1e-6) for key in found.keys() | expected.keys()
    )
