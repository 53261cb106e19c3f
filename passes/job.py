"""The state of one layer on its way through a pipeline, and the base of the passes that work on it.

A `Job` lives in the ``meta`` store of the layer's node (never serialized), so that passes compose in `ir.passes.Sequential` as
well as in `magr_onnx.passes.layerwise`, which runs them layer by layer to bound memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.low_rank import Factors
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import ActivationGrid, Array, Goal, LayerStats, QuantizedWeight, check_weight
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer, find

META = "magr_onnx.job"

BiasPolicy = Literal["existing", "any", "none"]
Stored = dict[str, list[ir.Value]]
"""Constants made of a weight, by the suffix of their names."""


def absorbs(layer: LinearLayer, bias: BiasPolicy | None) -> bool:
    """Whether a bias of the layer will take up its mean error under a policy of the bias compensation."""
    return bias == "any" or (bias == "existing" and layer.has_bias)


@dataclass(slots=True, eq=False)
class Job:
    """One layer being worked on.

    Attributes:
        layer: The view of the graph.
        stats: Second moments of its input.
        reference: The weight as the model came, ``(K, N)``: errors are measured against it.
        target: What the quantizer aims at, ``(K, N)``: the reference, or what error feedback makes of it.
        weight: The float weight now (after MagR, or dequantized, with the product of ``factors``).
        bias: The effective bias now, or None.
        quantized: The codes, once chosen.
        factors: A low-rank float branch beside the quantized product, if there is one.
        changed: Whether ``weight`` or ``bias`` differ from what the graph holds.
        emitted: Whether the layer's nodes have been replaced.
        facts: What the passes have to say, for the report.
        notes: Sentences for the report.
        output_grid: The static grid of the product, where outputs are quantized too.
        goal: What the layer should put out, where layers before it are quantized.
        kept_target: ``target`` from the rows that are not held out, after error feedback.
        outputs: Second moments of gradients at its outputs ``(N, N)``, where they were asked for.
        stored: What `constant` has made; one for all layers that share the weight.
        alone: Whether no other layer shares it.
    """

    layer: LinearLayer
    stats: LayerStats
    reference: Array
    target: Array
    weight: Array
    bias: Array | None
    quantized: QuantizedWeight | None = None
    factors: Factors | None = None
    changed: bool = False
    emitted: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    output_grid: ActivationGrid | None = None
    goal: Goal | None = None
    kept_target: Array | None = None
    outputs: Array | None = None
    stored: Stored = field(default_factory=dict)
    alone: bool = True

    @staticmethod
    def start(layer: LinearLayer, stats: LayerStats | None) -> Job:
        """Read the layer.

        Raises:
            NonFiniteError: The weight holds NaN or infinity.
        """
        weight = layer.read()
        check_weight(f"weight of {layer.name}", weight)
        return Job(layer, stats or LayerStats.data_free(layer.k), weight, weight, weight, layer.read_bias())

    def centred(self, bias: BiasPolicy | None) -> bool:
        """Whether the mean error will be absorbed by a bias, so that the centred Gram matrix is the objective."""
        return not self.stats.is_data_free and absorbs(self.layer, bias)

    def constant(self, suffix: str, array: npt.NDArray[Any], inside: bool = False) -> ir.Value:
        """A constant made of the weight, as `LinearLayer.constant`; layers that share the weight have it once, and in the main graph."""
        known = self.stored.setdefault(suffix, [])
        for value in known:
            if value.const_value is not None and _same(value.const_value.numpy(), array):
                return value
        known.append(self.layer.constant(suffix, array, inside=inside and self.alone))
        return known[-1]

    @property
    def bytes(self) -> int:
        """Of the constants made of the weight."""
        return sum(v.const_value.nbytes for values in self.stored.values() for v in values if v.const_value is not None)

    def stored_in_blocks(self, rows: int) -> None:
        """Take note of blocks that an emitter stores a grid a block for, where a grid of the solution is that of several."""
        assert self.quantized is not None
        spec, blocks = self.quantized.spec, -(-self.layer.k // rows)
        if more := (blocks - spec.groups(self.layer.k)) * self.layer.n:
            bits = 8 * np.dtype(spec.scale_dtype).itemsize + (0 if spec.symmetric else container_bits(spec.bits))
            self.facts |= {"stored_block": rows, "repeated": more * bits // 8}

    def own_name(self, constant: ir.Value, suffix: str) -> str:
        """A name for what the layer makes of a constant: after the constant, or after the layer where others read that too."""
        return f"{self.layer.name if len(list(constant.uses())) > 1 else constant.name}{suffix}"

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Put an emitter's nodes in the place of the layer, and behind them the low-rank branch: ``... + (x A) B``.

        A Sum adds it: of MatMul and Add onnxruntime makes a Gemm on two axes, and would no longer see a DequantizeLinear and a MatMul.
        """
        self.emitted = True
        if self.factors is None:
            self.layer.replace(nodes)
            return
        layer, kind = self.layer, FLOATS[self.layer.dtype]
        quantized = nodes[-1].outputs[0]
        down = ir.node("MatMul", [layer.x, self.constant("_down", self.factors.down.astype(kind))], name=f"{layer.name}_down")
        up = ir.node("MatMul", [down.outputs[0], self.constant("_up", self.factors.up.astype(kind))], name=f"{layer.name}_up")
        total = ir.node("Sum", [quantized, up.outputs[0]], name=f"{layer.name}_low_rank")
        for value, suffix in ((quantized, "quantized"), (down.outputs[0], "down"), (up.outputs[0], "up")):
            value.name, value.dtype = f"{layer.output.name}_{suffix}", layer.dtype
        quantized.shape = up.outputs[0].shape = layer.output.shape
        layer.replace([*nodes, down, up, total])

    def write_back(self) -> None:
        """Put changed floats back into the graph, unless an emitter already replaced the layer."""
        if self.changed and not self.emitted:
            self.layer.write(self.weight, self.bias, self.constant)
            self.changed = False


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def attach(layer: LinearLayer, stats: LayerStats | None) -> Job:
    """Start a job for the layer and remember it at its node."""
    job = Job.start(layer, stats)
    layer.node.meta[META] = job
    return job


def jobs(model: ir.Model) -> Iterator[Job]:
    """The job of every layer in graph order; layers without one start data-free."""
    layers, _ = find(model)
    for layer in layers:
        job = layer.node.meta.get(META)
        if isinstance(job, Job):
            job.layer = layer  # a fresh view: earlier passes may have changed the node's inputs
            yield job
        else:
            yield attach(layer, None)
