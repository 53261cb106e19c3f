"""Patterns that name layers: what they match in a model, and in the models of a folder together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from magr_onnx.config.layer_options import LayerOptions, near, unmatched
from magr_onnx.errors import OptionError, raise_all
from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.canonical.rewriter import weight
from magr_onnx.passes.graph import dead_code
from magr_onnx.passes.instrument.inline import open_up
from magr_onnx.passes.layers import conv, embedding
from magr_onnx.passes.layers.linear import REFUSED, LinearLayer, find, known_as, matched
from magr_onnx.passes.layers.unconverted import holders

Names = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Patterns:
    """What was said of layers by pattern.

    Attributes:
        include: Layers to convert; empty for all.
        exclude: Layers to leave as they are.
        tables: Options of single layers.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    tables: Sequence[LayerOptions] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """Names that patterns may match in a model.

    Attributes:
        units: Of layers, convolutions and tables: all names of each.
        others: Of what can be no layer.
        chosen: Of the linear layers to convert.
        convolutions: Of the convolutions to convert.
    """

    units: Names
    others: Names
    chosen: Names
    convolutions: Names

    def has(self, pattern: str) -> bool:
        """Whether there is anything of that name, to convert or not."""
        return any(matched(some, [pattern]) for some in (*self.units, *self.others))


def known(model: ir.Model, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Known:
    """The names in a model whose layers are in canonical form."""
    layers, skips = find(model)
    convolutions, unfit = conv.find(model)
    tables, untouched = embedding.find(model)
    every: list[LinearLayer | conv.ConvLayer | embedding.Table] = [*layers, *convolutions, *tables]
    units = [known_as(one.node, one.name, one.weight_name) for one in every]
    others: list[tuple[str, ...]] = [(skip.name,) for skip in (*skips, *unfit, *untouched, *holders(model.graph.all_nodes()))]
    others += [  # what was excluded before it could be brought into a layer's form
        known_as(node, str(node.name), found.name)
        for node in model.graph.all_nodes()
        if REFUSED in node.meta
        for value in node.inputs[:2]
        if (found := weight(value)) is not None
    ]
    chosen = [known_as(one.node, one.name, one.weight_name) for one in find(model, include, exclude)[0]]
    convs = [known_as(one.node, one.name, one.weight_name) for one in conv.find(model, include, exclude)[0]]
    return Known(units, others, chosen, convs)


def settle(model: ir.Model, include: Sequence[str], exclude: Sequence[str], again: bool) -> list[str]:
    """Bring a model, whose bodies and functions are open, into the form in which layers and the names of patterns are looked for.

    What nobody reads is no layer, and goes first. ``again`` is `magr_onnx.optimize`'s ``requantize``. Returns sentences for the report.
    """
    return [*dead_code.remove(model), *canonicalize(model, include, exclude, again=again)]


def check(model: ir.Model, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse patterns that nothing in the model has the name of.

    Raises:
        OptionError: With every such pattern, and the names that are like it.
    """
    if include or exclude:
        raise_all(OptionError, _nowhere([known(model)], Patterns(include, exclude)))


def look(model: ir.Model, said: Patterns, again: bool) -> Known:
    """The names in a model as it was loaded, which is brought into canonical form; ``again`` as `magr_onnx.optimize` has ``requantize``."""
    open_up(model)
    settle(model, said.include, said.exclude, again)
    return known(model, said.include, said.exclude)


def share(models: Mapping[str, Known], said: Patterns) -> dict[str, Patterns]:
    """What each model of a folder gets of the patterns: those that match something in it.

    Raises:
        OptionError: With every pattern that matches in none of the models, and every model that has no layer to include.
    """
    every = list(models.values())
    wrong = _nowhere(every, said)
    names, convs = [n for one in every for n in one.chosen], [n for one in every for n in one.convolutions]
    found = [unmatched(pattern, names, convs) for table in said.tables if not table.optional for pattern in table.match]
    wrong += [text for text in found if text is not None]
    left_out = [name for name, one in models.items() if said.include and not any(map(one.has, said.include))]
    if len(left_out) < len(models):
        wrong += [
            f"{name} has no layer that include {', '.join(said.include)} matches; leave it out (models, --models)" for name in left_out
        ]
    raise_all(OptionError, wrong)
    return {name: _of(one, said) for name, one in models.items()}


def _nowhere(models: Sequence[Known], said: Patterns) -> list[str]:
    names = [n for one in models for n in one.units]
    return [
        f"{option} {pattern!r} matches no layer{near(pattern, names)}"
        for option, patterns in (("include", said.include), ("exclude", said.exclude))
        for pattern in patterns
        if not any(one.has(pattern) for one in models)
    ]


def _of(model: Known, said: Patterns) -> Patterns:
    """The part of patterns that matches something in one model; optional tables say themselves where they match nothing."""
    include, exclude = ([pattern for pattern in some if model.has(pattern)] for some in (said.include, said.exclude))
    tables = []
    for table in said.tables:
        hits = tuple(p for p in table.match if table.optional or any(matched(some, [p]) for some in model.chosen))
        tables += [replace(table, match=hits)] if hits else []
    return Patterns(include, exclude, tables)
