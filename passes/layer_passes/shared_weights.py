"""Layers that multiply by the very same matrix: one solve, codes stored once.

Readers ``r`` of one ``W`` see inputs of their own. What all of them lose together is one layer error under the sum of their Gram matrices,

    sum_r n_r tr(D^T H_r D) = n tr(D^T H D),     H = sum_r n_r H_r / n,

with ``H_r - mu_r mu_r^T`` in place of ``H_r`` where r's bias takes up the mean. So the passes that choose a weight (`LayerStage.solves`)
run once, for the first reader, under ``H``; the others take its codes over. Bias compensation and emission stay each reader's own, from its
own mean and activation grid; constants made of the codes are shared.

Second moments of gradients differ between readers and do not add up to one matrix: a shared weight is rounded without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from magr_onnx.core.types import LayerStats
from magr_onnx.passes.base import LayerStage
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.job import BiasPolicy, Job, Stored, absorbs
from magr_onnx.passes.layer_passes.quantize import relative_error
from magr_onnx.passes.layers.linear import LinearLayer, layer_name
from magr_onnx.passes.layers.shared import Key, by_weight, readers


class Bond:
    """One weight on its way through a pipeline, for all that multiply by it.

    Attributes:
        stored: Constants made of its codes.
    """

    def __init__(self, readers: Sequence[tuple[LinearLayer, LayerStats | None]]) -> None:
        """Readers with the statistics of their inputs; None for none."""
        self.stored: Stored = {}
        self._readers = readers
        self._stats: dict[BiasPolicy | None, LayerStats] = {}
        self._first: Job | None = None
        self._names = [layer.name for layer, _ in readers]
        self._changed = False
        self._facts: dict[str, Any] = {}
        self._notes: list[str] = []

    def stats(self, policy: BiasPolicy | None) -> LayerStats:
        """The statistics of all readers together, under a policy of the bias compensation; see the module."""
        if policy not in self._stats:
            seen = [(s, absorbs(layer, policy)) for layer, s in self._readers if s is not None and not s.is_data_free]
            self._stats[policy] = _summed(seen) if seen else LayerStats.data_free(self._readers[0][0].k)
        return self._stats[policy]

    def apply(self, p: LayerStage, job: Job) -> None:
        """Run a pass that solves for the first reader; give its result to the others."""
        policy: BiasPolicy | None = getattr(p, "bias", None)
        if self._first is None:
            self._first = job
        note = f"shares its weight with {_some([n for n in self._names if n != job.layer.name])}: one solve for all, codes stored once"
        if note not in job.notes:
            job.notes.append(note)
        if job is self._first:
            self._solve(p, job, policy)
        elif job.quantized is None and job.factors is None:
            job.weight, job.quantized, job.factors = self._first.weight, self._first.quantized, self._first.factors
            job.changed = self._changed
            job.facts |= self._facts
            job.notes += self._notes
        if "error" in job.facts:
            job.facts["error"] = relative_error(job, job.centred(policy))

    def _solve(self, p: LayerStage, job: Job, policy: BiasPolicy | None) -> None:
        own, facts, notes = job.stats, dict(job.facts), len(job.notes)
        job.stats, job.outputs = self.stats(policy), None
        p.apply(job)
        job.stats, self._changed = own, job.changed
        self._facts |= {name: fact for name, fact in job.facts.items() if facts.get(name) is not fact}
        self._notes += job.notes[notes:]


def _summed(readers: Sequence[tuple[LayerStats, bool]]) -> LayerStats:
    """Of rows that are centred by each reader's own mean where its bias takes that up."""

    def part(stats: LayerStats, centred: bool) -> LayerStats:
        return LayerStats(stats.objective_gram(centred), np.zeros_like(stats.mean), stats.rows)

    whole = reduce(LayerStats.combine, (part(stats, centred) for stats, centred in readers))
    held = [part(stats.held_out, centred) for stats, centred in readers if stats.held_out is not None]
    return LayerStats(whole.gram, whole.mean, whole.rows, held_out=reduce(LayerStats.combine, held) if held else None)


def bonds(layers: Iterable[LinearLayer], stats: Callable[[LinearLayer], LayerStats | None]) -> dict[Key, Bond]:
    """A bond for every weight that several of ``layers`` multiply by, by `LinearLayer.weight_key`."""
    return {some[0].weight_key: Bond([(x, stats(x)) for x in some]) for some in by_weight(layers) if len(some) > 1}


def remarks(layers: Sequence[LinearLayer], added: Mapping[str, int], alone: bool = False) -> dict[str, list[str]]:
    """What there is to say of layers (as they were found, and converted by now) whose weight others read too, by layer name.

    ``added`` has the bytes of the codes that were written for each. ``alone`` is for stages of a model too large to be run as a whole,
    which solve every layer by itself.
    """
    found: dict[str, list[str]] = {layer.name: [] for layer in layers}
    for layer in layers:
        same = [
            x.name for x in layers if alone and x is not layer and not x.nested and not layer.nested and x.weight_key == layer.weight_key
        ]
        if same:
            found[layer.name].append(f"{_some(same)} reads the same weight in another stage, and has codes of its own")
        turned = [x.name for x in layers if x.weight_key != layer.weight_key and _same_elements(x, layer)]
        if turned:
            found[layer.name].append(f"{_some(turned)} reads the same weight transposed or scaled, so that their codes cannot be shared")
        if left := readers(layer):
            names = _some([f"{layer_name(node)} ({node.op_type})" for node in left])
            ways = [f"leave it out (exclude={[scope_of(layer.node) or layer.name]})"]
            ways += ['convert the table as well (embeddings="gather-block-quantized")'] * any(node.op_type == "Gather" for node in left)
            stays = f"its float weight ({layer.weight.stored.nbytes} bytes) stays in the file for {names}"
            more = added.get(layer.name)
            cost = f"converting it saved nothing and added {more} bytes: {stays}; {' or '.join(ways)}"
            found[layer.name].append(stays if more is None else cost)
    return found


def _same_elements(a: LinearLayer, b: LinearLayer) -> bool:
    """Whether two layers read the same elements of a tensor, and not two parts of it."""
    return a.weight.key == b.weight.key


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
