"""Description of an output format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.layer import BiasPolicy
from magr_onnx.core.types import Array
from magr_onnx.model_io.writing import release_mmap
from magr_onnx.passes.base import Emitter
from magr_onnx.passes.graph.nodes import only_use
from magr_onnx.passes.layers.conv import Form

Operator = tuple[str, str]
"""Domain and type of a node."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reader of the weights of one operator.

    Attributes:
        weight: Dequantizes the weight ``(K, N)`` of a node; None if the node is not of this form.
        behind: Operators that convert the product to floats, in order; each is optional.
        bias: Whether an Add of the bias, and a Cast to float16, may follow.
        branch: Whether a Sum with a low-rank branch may follow.
    """

    weight: Callable[[ir.Node], Array | None]
    behind: tuple[str, ...] = ()
    bias: bool = True
    branch: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """An output format: how quantized weights are written and read back, and its defaults.

    Attributes:
        name: Value of the option ``format``.
        summary: What is written, for help and documentation.
        emitter: The pass that writes it.
        readers: Readers of weights, by operator.
        kernel_blocks: Block sizes of its kernels, by bits; None for one scale per column.
        bits: Default bits of weights.
        block_size: Default rows per scale; None for one scale per column.
        symmetric: Default symmetry of grids.
        bias: Default policy of bias correction.
        effort: Default effort.
        conv_form: Default dequantization of convolutions.
        emitter_options: Fields of the emitter, by the option of a run that sets them.
        exclusive_options: Options of a run that are for this format only.
        fit_accumulator: Sizes the options of a run with ``accumulator_bits`` so that sums of any weights fit; None where the quantizer
            constrains weights instead. Raises `magr_onnx.errors.OptionError` if none fit.
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
    exclusive_options: tuple[str, ...] = ()
    fit_accumulator: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def make_emitter(self, options: Mapping[str, Any]) -> Emitter:
        """Make the emitter for the options of a run."""
        return self.emitter(**{field: options[name] for name, field in self.emitter_options.items() if name in options})


def stored_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Read a constant; None for any other value. Memory maps of external data are released, as a model has many."""
    tensor = None if value is None else value.const_value
    if tensor is None:
        return None
    array: npt.NDArray[Any] = tensor.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        array = array.copy()
        release_mmap(tensor)
    return array


def only_reader(node: ir.Node | None, op: str) -> ir.Node | None:
    """Return the only reader of a node's output if it is an ``op``, else None."""
    reader = None if node is None else only_use(node.outputs[0])[0]
    return reader if reader is not None and (reader.domain, reader.op_type) == ("", op) else None
