"""Layers on their way through a pipeline, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from magr_onnx.core.types import LayerStats
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.job import META, Job, attach
from magr_onnx.passes.layer_passes import shared_weights
from magr_onnx.passes.layer_passes.checkpoint import Store
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.plan import Plan


def run_layers(
    plan: Plan,
    layers: Iterable[LinearLayer],
    stats: Callable[[LinearLayer], LayerStats | None],
    finished: Callable[[Job], None],
    begin: Callable[[Job], None] | None = None,
    assigned: Mapping[str, Plan] | None = None,
    store: Store | None = None,
) -> None:
    """Take layers one by one through a plan, so that only one layer's arrays are alive at a time.

    ``begin`` may add to a fresh job what else is known of its layer; ``assigned`` holds the plans of layers that have their own, by
    layer name. What the stages before the emitter come to is taken from a ``store``, where it has it, and given to it where not.
    Layers that share a weight and are here at once are solved together.
    """
    layers = list(layers)
    for graph in {layer.root for layer in layers}:
        Names.rescan(graph)
    bonds = shared_weights.bonds(layers, stats)
    for layer in layers:
        job = attach(layer, stats(layer))
        if begin is not None:
            begin(job)
        bond = bonds.get(layer.weight_key)
        if bond is not None:
            job.stored, job.alone = bond.stored, False
        of_layer = (assigned or {}).get(layer.name, plan)
        if store is None or not store.restore(job):
            for stage in of_layer.solving:
                if bond is not None and stage.solves:
                    bond.apply(stage, job)
                else:
                    stage.apply(job)
            if store is not None:
                store.keep(job)
        if of_layer.emitter is not None:
            of_layer.emitter.apply(job)
        job.write_back()
        finished(job)
        layer.node.meta.pop(META, None)
