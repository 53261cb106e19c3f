"""What was converted, as the report and the checks of the result need it: layers, convolutions and tables alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from magr_onnx.core.histograms import sampled_steps, subsample
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import Array
from magr_onnx.passes import Skip
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.readback import digest
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layers.weighted import WeightedNode
from magr_onnx.report.layer_row import LayerRow


@dataclass(slots=True, eq=False)
class Converted:
    """What was converted so far.

    Attributes:
        rows: A row of the report for every layer.
        skips: What was left alone, and why.
        emitted: What was written for layers, by layer name.
        digests: Of the dequantized weights, by the name of the output.
        notes: Whatever else should be known.
    """

    rows: list[LayerRow] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    emitted: dict[str, Emitted] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        layer: WeightedNode,
        solution: LayerSolution,
        emitted: Emitted | None,
        written: Array | Iterator[Array] | None = None,
        groups: int = 1,
    ) -> None:
        """Add a layer; ``written`` is its dequantized weight as `magr_onnx.passes.emit.readback` reads it, if it was put on a grid, as a
        whole or in parts along its first axis."""
        self.rows.append(_layer_row(layer, solution, emitted, groups))
        if emitted is not None:
            self.emitted[layer.name] = emitted
            if written is not None:
                self.digests[str(layer.output.name)] = digest(written)


def _layer_row(layer: WeightedNode, solution: LayerSolution, emitted: Emitted | None, groups: int) -> LayerRow:
    """Describe a converted layer; ``groups`` are those of a convolution."""
    record, bits, block = solution.record, None, None
    notes = [*record.notes, *(() if emitted is None else emitted.notes)]
    if solution.quantized is not None:
        spec = solution.quantized.spec
        bits, block = spec.bits, spec.rows(len(solution.weight))
        stored = container_bits(bits) if emitted is None else emitted.stored_bits
        if stored != bits:
            notes.append(f"{bits}-bit codes are stored in {stored} bits")
    figures = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in ("errors", "notes")}
    return LayerRow(
        **figures,
        estimate=record.error,
        name=layer.name,
        op=layer.op,
        weight=layer.weight_name,
        k=layer.k,
        n=layer.n,
        bits=bits,
        block_size=block,
        emitted=None if emitted is None else emitted.node,
        notes=tuple(notes),
        groups=groups,
        errors=tuple(subsample(record.errors)),
        sweeps=tuple(sampled_steps(len(record.errors))),
        output=layer.output.name,
        scope=scope_of(layer.node),
        stored_block=None if emitted is None else emitted.stored_block,
    )
