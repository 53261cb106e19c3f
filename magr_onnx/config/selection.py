"""Patterns that name layers: what they match in a model, and in the models of a folder together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from magr_onnx.config.layer_options import LayerOptions, near, unmatched
from magr_onnx.errors import OptionError, raise_all
from magr_onnx.passes.canonical import canonicalize, carried, routers
from magr_onnx.passes.canonical.rewriter import weight
from magr_onnx.passes.graph import dead_code
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers import conv, embedding, experts, recurrent
from magr_onnx.passes.layers.linear import REFUSED, find
from magr_onnx.passes.layers.selection import ALL, Selection, matches, names_of
from magr_onnx.passes.layers.unconverted import unconverted_weights
from magr_onnx.passes.layers.weighted import WeightedNode

Names = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Patterns:
    """What a caller said of layers by pattern.

    Attributes:
        selection: The layers to convert.
        tables: Options of single layers.
    """

    selection: Selection = ALL
    tables: Sequence[LayerOptions] = ()


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Names that patterns may match in a model.

    Attributes:
        units: Of layers, convolutions, recurrent operators, experts and tables: all names of each.
        others: Of what can be no layer.
        selected: Of the linear layers and experts to convert.
        convolutions: Of the convolutions to convert.
    """

    units: Names
    others: Names
    selected: Names
    convolutions: Names

    def has(self, pattern: str) -> bool:
        """Whether there is anything of that name, to convert or not."""
        return any(matches(names, [pattern]) for names in (*self.units, *self.others))


def layer_names(model: ir.Model, selection: Selection = ALL) -> LayerNames:
    """The names in a model whose layers are in canonical form."""
    layers, skips = find(model)
    convolutions, conv_skips = conv.find(model)
    tables, table_skips = embedding.find(model)
    operators, operator_skips = recurrent.find(model)
    mixtures, mixture_skips = experts.find(model)
    units: list[WeightedNode] = [*layers, *convolutions, *tables, *operators, *mixtures]
    others: list[tuple[str, ...]] = [
        (skip.name,)
        for of_kind in (skips, conv_skips, table_skips, operator_skips, mixture_skips, unconverted_weights(model.graph.all_nodes()))
        for skip in of_kind
    ]
    others += [  # what was excluded before it could be brought into a layer's form
        names_of(node, str(node.name), constant.name)
        for node in model.graph.all_nodes()
        if REFUSED in node.meta
        for value in node.inputs[:2]
        if (constant := weight(value)) is not None
    ]
    selected = [*find(model, selection)[0], *experts.find(model, selection)[0]]
    return LayerNames(_names(units), others, _names(selected), _names(conv.find(model, selection)[0]))


def _names(units: Sequence[WeightedNode]) -> Names:
    return [names_of(unit.node, unit.name, unit.weight_name) for unit in units]


def canonical(model: ir.Model, selection: Selection, requantize: bool) -> list[str]:
    """Bring a model, whose bodies and functions are open, into the form in which layers and the names of patterns are looked for.

    What nobody reads is no layer, and goes first. ``requantize`` is that of `magr_onnx.optimize`. Returns sentences for the report.
    """
    notes = [*dead_code.remove(model), *carried.release(model), *canonicalize(model, selection, requantized=requantize)]
    if not selection.include:
        routers.keep_float(model)
    return notes


def check(model: ir.Model, selection: Selection) -> None:
    """Refuse patterns that nothing in the model has the name of.

    Raises:
        OptionError: With every such pattern, and the names that are like it.
    """
    if selection:
        raise_all(OptionError, _unmatched([layer_names(model)], selection))


def names_as_loaded(model: ir.Model, selection: Selection, requantize: bool) -> LayerNames:
    """The names in a model as it was loaded, which is brought into canonical form."""
    inline_and_rename(model)
    canonical(model, selection, requantize)
    return layer_names(model, selection)


def share(models: Mapping[str, LayerNames], patterns: Patterns) -> dict[str, Patterns]:
    """What each model of a folder gets of the patterns: those that match something in it.

    Raises:
        OptionError: With every pattern that matches in none of the models, and every model that has no layer to include.
    """
    include = patterns.selection.include
    problems: list[str | None] = [*_unmatched(list(models.values()), patterns.selection)]
    names = [n for model in models.values() for n in model.selected]
    convolutions = [n for model in models.values() for n in model.convolutions]
    problems += [unmatched(pattern, names, convolutions) for table in patterns.tables if not table.optional for pattern in table.match]
    without = [name for name, model in models.items() if include and not any(map(model.has, include))]
    if len(without) < len(models):
        problems += [f"{name} has no layer that include {', '.join(include)} matches; leave it out (models, --models)" for name in without]
    raise_all(OptionError, problems)
    return {name: _matching(model, patterns) for name, model in models.items()}


def _unmatched(models: Sequence[LayerNames], selection: Selection) -> list[str]:
    names = [n for model in models for n in model.units]
    return [
        f"{option} {pattern!r} matches no layer{near(pattern, names)}"
        for option, patterns in (("include", selection.include), ("exclude", selection.exclude))
        for pattern in patterns
        if not any(model.has(pattern) for model in models)
    ]


def _matching(model: LayerNames, patterns: Patterns) -> Patterns:
    """The part of patterns that matches something in one model; optional tables say themselves where they match nothing."""
    include, exclude = (
        [pattern for pattern in each if model.has(pattern)] for each in (patterns.selection.include, patterns.selection.exclude)
    )
    tables = []
    for table in patterns.tables:
        hits = tuple(p for p in table.match if table.optional or any(matches(names, [p]) for names in model.selected))
        tables += [replace(table, match=hits)] if hits else []
    return Patterns(Selection(include, exclude), tables)
