"""What is to be known of an output format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.layer import BiasPolicy
from magr_onnx.core.types import Array
from magr_onnx.model_io.writing import release_mmap
from magr_onnx.passes.base import Emitter, InputGrids
from magr_onnx.passes.layers.conv import Form

Operator = tuple[str, str]
"""Domain and type of a node."""


@dataclass(frozen=True, slots=True)
class Reader:
    """How weights are read back from the products of one operator.

    Attributes:
        weight: The dequantized weight ``(K, N)`` a node multiplies by; None where the node is not of this form.
        behind: Operators that turn the product into floats, in order; each may be missing.
        bias: Whether an Add of the bias, and a Cast to float16, may stand behind that.
        branch: Whether a Sum with a low-rank branch may stand behind that.
    """

    weight: Callable[[ir.Node], Array | None]
    behind: tuple[str, ...] = ()
    bias: bool = True
    branch: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """An output format: how quantized weights are written and read back, and what is usual for it.

    Attributes:
        name: What users call it.
        summary: What is written, for help and documentation.
        emitter: The pass that writes it.
        readers: How weights are read back, by operator.
        kernel_blocks: Rows that share a scale in its kernels, by bits; None for a whole column.
        bits: Bits of the weights where none are given.
        block_size: Rows that share a scale where nothing is said; None for a whole column.
        symmetric: Whether grids are symmetric where nothing is said.
        bias: Which biases take up the mean error where nothing is said.
        effort: The effort where none is given.
        conv_form: How codes of convolutions become floats in such a file where nothing is said.
        emitter_options: Options of a run that the emitter takes, and the fields of the emitter they fill.
        own_options: Options of a run that are for this format only.
        fit_accumulator: Given the options of a run with ``accumulator_bits``, those whose sums fit it for any weights; None where the
            quantizer keeps weights within the accumulator. Raises `magr_onnx.errors.OptionError` where none fit.
    """

    name: str
    summary: str
    emitter: type[Emitter]
    readers: Mapping[Operator, Reader]
    kernel_blocks: Mapping[int, tuple[int | None, ...]]
    bits: int = 4
    block_size: int | None = 32
    symmetric: bool = False
    bias: BiasPolicy = "existing"
    effort: Literal["fast", "balanced", "best"] = "balanced"
    conv_form: Form = "fold"
    emitter_options: Mapping[str, str] = field(default_factory=dict)
    own_options: tuple[str, ...] = ()
    fit_accumulator: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    @property
    def input_grids(self) -> InputGrids | None:
        """The grids of layer inputs that the format needs; None for float inputs."""
        return self.emitter.input_grids

    def make_emitter(self, options: Mapping[str, Any]) -> Emitter:
        """Make the emitter that the options of a run ask for."""
        return self.emitter(**{field: options[name] for name, field in self.emitter_options.items() if name in options})


def stored_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The values of a constant, None where it is none. What was unpacked from a file is not kept: a model has many of them."""
    tensor = None if value is None else value.const_value
    if tensor is None:
        return None
    array: npt.NDArray[Any] = tensor.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        array = array.copy()
        release_mmap(tensor)
    return array


def only_reader(node: ir.Node | None, op: str) -> ir.Node | None:
    """The only node that reads ``node``'s output, if it is an ``op``."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op and uses[0].node.domain == "" else None
