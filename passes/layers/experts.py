"""Views of mixtures of experts: com.microsoft MoE with constant weights.

Each of ``E`` experts is a network of two layers, ``fc2(activation(fc1(x)))``. A router has a score for every expert and token, and a token
goes to the ``k`` experts that score highest (`magr_onnx.core.experts`). Weights are stacked, output channels first: ``fc1 (E, F, H)`` and
``fc2 (E, H, I)`` of ``H`` inputs and ``I`` hidden units, with ``F = 2 I`` where the first layer has a gate beside every unit (swiglu), else
``I``.

onnxruntime's kernel for CPUs has no third projection (``fc3``), and takes gates interleaved only. Measured with onnxruntime 1.26 and 1.32.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.experts import ACTIVATIONS, GATED, Form
from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import ConstantView, constant_view
from magr_onnx.passes.graph.nodes import attribute_of, layer_name, operand
from magr_onnx.passes.graph.subgraphs import SubgraphPath
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import (
    FLOATS,
    WeightedNode,
    find_views,
    float_readers,
    in_closed_body,
    in_functions,
    refusal,
    skip_of,
)
from magr_onnx.report.reasons import ExpertReason, Skip

DOMAIN, OPERATOR, QUANTIZED = "com.microsoft", "MoE", "QMoE"
PROJECTIONS = ("fc1", "fc2")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayer(WeightedNode):
    """A safe view of one MoE.

    Attributes:
        weight: ``fc1 (E, F, H)``.
        second: ``fc2 (E, H, I)``.
        biases: Of both, ``(E, F)`` and ``(E, H)``; None for no bias.
        form: How tokens are routed, and what is between the layers.
    """

    second: ConstantView
    biases: tuple[ConstantView | None, ConstantView | None]
    form: Form

    @property
    def op(self) -> str:
        """Return the operator in the float model."""
        return OPERATOR

    @property
    def router(self) -> ir.Value:
        """Return the scores of the experts, ``(tokens, E)``."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def experts(self) -> int:
        """Return ``E``."""
        return self.weight.shape[0]

    @property
    def groups(self) -> int:
        """Return ``E``."""
        return self.experts

    @property
    def has_bias(self) -> bool:
        """Return whether both layers of an expert have a bias."""
        return None not in self.biases

    @property
    def k(self) -> int:
        """Return the inputs ``H`` of an expert."""
        return self.weight.shape[2]

    @property
    def units(self) -> int:
        """Return the inputs ``I`` of the second layer of an expert."""
        return self.second.shape[2]

    @property
    def n(self) -> int:
        """Return the columns of both layers of an expert side by side, ``F + I``, the second one transposed."""
        return self.weight.shape[1] + self.units

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of the matrices of both layers of an expert, ``(H, F)`` and ``(I, H)``."""
        return (self.k, self.weight.shape[1]), (self.units, self.k)

    @property
    def weight_key(self) -> Hashable:
        biases = tuple(None if view is None else view.key for view in self.biases)
        return (*self.weight.key, *self.second.key, *biases, self.form)

    @property
    def bytes(self) -> int:
        """Return the size of both weights as the operator reads them."""
        return sum(view.tensor().nbytes for view in (self.weight, self.second))

    def stacks(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Read both weights as they are stored, ``(E, F, H)`` and ``(E, H, I)``."""
        return self.weight.tensor().numpy(), self.second.tensor().numpy()

    def matrices(self, numbers: Iterable[int]) -> Iterator[tuple[Array, Array]]:
        """Read the matrices of some experts, ``(H, F)`` and ``(I, H)`` float32, one expert at a time."""
        first, second = self.stacks()
        for number in numbers:
            yield to_matrix(first[number]), to_matrix(second[number])

    def read(self) -> Array:
        """Read the matrices of all experts, the second one transposed: ``(E, H, F + I)`` float32."""
        return np.stack([np.hstack([first, second.T]) for first, second in self.matrices(range(self.experts))])

    def parts(self) -> Iterator[Array]:
        """Read the matrices of all experts, one at a time."""
        for both in self.matrices(range(self.experts)):
            yield from both

    def read_biases(self) -> tuple[Array | None, Array | None]:
        """Read the biases of both layers of all experts, ``(E, F)`` and ``(E, H)`` float64; None where there is none."""
        first, second = (None if view is None else view.tensor().numpy().astype(np.float64) for view in self.biases)
        return first, second

    def read_bias(self) -> Array | None:
        """Read all biases in a row; None where there are none."""
        found = [bias.ravel() for bias in self.read_biases() if bias is not None]
        return np.concatenate(found) if found else None


def to_matrix(weight: npt.NDArray[Any]) -> Array:
    """Turn a weight ``(N, K)`` into a matrix ``(K, N)`` float32."""
    return np.ascontiguousarray(weight.T, np.float32)


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[ExpertLayer], list[Skip]]:
    """Find every MoE with constant weights, in subgraphs too, and skips for the others; see `find_views`."""
    layers, skips = find_views(model, {OPERATOR}, _view, selection, DOMAIN)
    return layers, skips + in_functions(model, {OPERATOR}, DOMAIN)


def readers(layer: ExpertLayer) -> Iterator[ir.Node]:
    """Yield the nodes that read a float weight of a layer."""
    for view in (layer.weight, layer.second):
        yield from float_readers(view.source)


def described(node: ir.Node) -> str:
    """Describe quantized experts; nothing for other nodes."""
    codes = constant_view(operand(node, 2))
    if node.op_type != QUANTIZED or codes is None or not codes.shape:
        return ""
    kind, bits, block = (
        attribute_of(node, name, usual) for name, usual in (("quant_type", "int"), ("expert_weight_bits", 4), ("block_size", 0))
    )
    grid = f"in blocks of {block}" if block else "with one scale a channel"
    what = f"{bits} bits {grid}" if kind == "int" else str(kind)
    return f"{attribute_of(node, 'k', 1)} of {codes.shape[0]} experts see a token, {what}"


def _view(node: ir.Node, path: SubgraphPath) -> ExpertLayer | Skip:
    if (refused := in_closed_body(node, path)) is not None:
        return refused
    form = _form(node)
    if isinstance(form, str):
        return skip_of(node, ExpertReason.ACTIVATION, form)
    views = []
    for index in (2, 4):
        view = constant_view(operand(node, index))
        if view is None:
            return skip_of(node, ExpertReason.DYNAMIC_WEIGHT)
        if (refused := refusal(node, view, 3)) is not None:
            return refused
        views.append(view)
    biases: list[ConstantView | None] = []
    for index in (3, 5):
        value = operand(node, index)
        view = constant_view(value)
        if value is not None and (view is None or view.overridable or view.dtype not in FLOATS):
            return skip_of(node, ExpertReason.DYNAMIC_WEIGHT, f"{value.name}")
        biases.append(view)
    first, second = views
    if (detail := _misfit(form, first, second, biases)) or operand(node, 0) is None or operand(node, 1) is None:
        return skip_of(node, ExpertReason.SHAPE, detail)
    return ExpertLayer(layer_name(node), node, first, second, (biases[0], biases[1]), form, path=path)


def _form(node: ir.Node) -> Form | str:
    """Read the attributes of a MoE; what no kernel for CPUs takes, as text."""
    activation = node.attributes.get_string("activation_type", "relu")
    fusion, limit = attribute_of(node, "swiglu_fusion", 0), node.attributes.get("swiglu_limit")
    faults = (
        (operand(node, 6) is not None, "a third projection (fc3)"),
        (activation not in ACTIVATIONS, f"activation_type {activation}"),
        (activation == GATED and fusion != 1, f"swiglu_fusion {fusion}"),
        (attribute_of(node, "use_sparse_mixer", 0) != 0, "use_sparse_mixer"),
        (attribute_of(node, "swiglu_limit_after_activation", 0) != 0, "swiglu_limit_after_activation"),
    )
    fault = next((text for fault, text in faults if fault), None)
    if fault is not None:
        return fault
    return Form(
        attribute_of(node, "k", 1),
        str(activation),
        node.attributes.get_float("activation_alpha", 1.0),
        node.attributes.get_float("activation_beta", 0.0),
        None if limit is None else limit.as_float(),
    )


def _misfit(form: Form, first: ConstantView, second: ConstantView, biases: list[ConstantView | None]) -> str:
    """What is wrong with shapes, as text; empty where they fit."""
    (count, wide, width), (others, height, units) = first.shape, second.shape
    fits = count == others and height == width and wide == (2 * units if form.gated else units) and 1 <= form.k <= count
    shapes = [(count, wide), (count, height)]
    fits &= all(bias is None or bias.shape == shape for bias, shape in zip(biases, shapes, strict=True))
    if fits and any(size % 4 for size in (width, units)):  # rows of 2-bit codes are whole bytes
        return f"{width} and {units} inputs are not both multiples of 4"
    return "" if fits else f"fc1 {list(first.shape)}, fc2 {list(second.shape)}, k {form.k}"
