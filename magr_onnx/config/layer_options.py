"""Options of single layers: tables that name layers by patterns, and the plans that layers get from them.

Tables apply in order to every layer they match; where two give the same option, the later one wins. What a layer gets makes it a
pipeline of its own, as a choice of mixed precision does, in which everything that is the whole run's stays as it is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from magr_onnx.config.options import OPTIONS, Options
from magr_onnx.config.plans import plan_of
from magr_onnx.config.schema import merge_options, none_to_word, unknown, word_to_none
from magr_onnx.errors import OptionError, closest, listed, raise_all
from magr_onnx.passes import Plan
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.selection import matches, names_of
from magr_onnx.passes.layers.weighted import WeightedNode, by_weight
from magr_onnx.passes.rewrites.base import own_bits

LAYER_OPTIONS = tuple(name for name, option in OPTIONS.items() if option.whole_run is None)
"""Options that may differ by layer."""

_BUDGETS = ("target_size", "max_loss")


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of the layers that a pattern matches.

    Attributes:
        match: Shell patterns on the name of a layer, of its weight or of its torch module.
        options: What these layers have instead of the run's options; names are among `LAYER_OPTIONS`.
        optional: Whether a model without such a layer is no mistake.

    Raises:
        OptionError: Everything that is wrong with them.
    """

    match: tuple[str, ...]
    options: Options = field(default_factory=Options)
    optional: bool = False

    def __post_init__(self) -> None:
        raise_all(OptionError, [text for _, text in problems_of({**self.options, "match": self.match})])
        object.__setattr__(self, "match", (self.match,) if isinstance(self.match, str) else tuple(self.match))
        object.__setattr__(self, "options", word_to_none(self.options))

    @staticmethod
    def of(table: Mapping[str, Any]) -> LayerOptions:
        """From plain data: ``{"match": "*lm_head*", "bits": 8}``.

        Raises:
            OptionError: Everything that is wrong with it.
        """
        raise_all(OptionError, [text for _, text in problems_of(table)])
        return LayerOptions(table["match"], cast(Options, {name: value for name, value in table.items() if name != "match"}))

    @staticmethod
    def parse(text: str) -> LayerOptions:
        """From ``PATTERN:option=value,...``, as ``*lm_head*:bits=8,block_size=channel``.

        Raises:
            OptionError: It is not that.
        """
        match, colon, pairs_text = text.rpartition(":")
        pairs = [part.partition("=") for part in pairs_text.split(",")]
        if not (match and colon and all(equals for _, equals, _ in pairs)):
            raise OptionError(f"--layer {text!r}: give PATTERN:option=value,..., such as '*lm_head*:bits=8,block_size=32'")
        names = [name.strip() for name, _, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OptionError(f"--layer {text!r}: {', '.join(twice)} is given twice; leave one out")
        try:
            return LayerOptions.of({"match": match, **dict(zip(names, (_value(value.strip()) for _, _, value in pairs), strict=True))})
        except OptionError as error:
            raise OptionError(f"--layer {text!r}: {error}") from error

    @property
    def table(self) -> dict[str, Any]:
        """Plain data that `of` takes."""
        return {"match": self.match[0] if len(self.match) == 1 else list(self.match), **none_to_word(self.options)}

    def __str__(self) -> str:
        return f"{', '.join(self.match)}: {described(self.options)}"


def problems_of(table: Any) -> list[tuple[str, str]]:
    """List everything wrong with the plain data of one table: the key, and a sentence."""
    if not isinstance(table, Mapping):
        return [("", f"a layer's options are a table with match and options, found {table!r}")]
    problems = []
    for name, value in table.items():
        text = None
        if name == "match":
            patterns = [value] if isinstance(value, str) else value
            if not (isinstance(patterns, list | tuple) and patterns and all(isinstance(p, str) for p in patterns)):
                text = f"match = {value!r}: expected a pattern or a list of patterns"
        elif name not in OPTIONS:
            text = unknown(name, ("match", *LAYER_OPTIONS))
        elif (reason := OPTIONS[name].whole_run) is not None:
            text = f"{name} cannot differ by layer: {reason}"
        else:
            text = OPTIONS[name].problem(value)
        if text is not None:
            problems.append((name, text))
    if "match" not in table:
        problems.append(("", "match is missing: give the pattern of the layers these options are for"))
    elif len(table) == 1:
        problems.append(("match", f"no options; give some of {', '.join(LAYER_OPTIONS)}"))
    return problems


def pipelines(tables: Sequence[LayerOptions], options: Options, plan: Plan, provider: str) -> list[Plan]:
    """Make the plan of every table by itself, so that errors come before any work. Optional tables that cannot have one are left out:
    `assign` refuses them where they match a layer.

    Raises:
        OptionError: With everything that no kernel, budget or format takes.
    """
    plans, problems = [], []
    for table in tables:
        try:
            plans.append(_plan(table.options, options, plan, provider))
        except OptionError as error:
            problems += [] if table.optional else [f"layers {', '.join(table.match)}: {error}"]
    raise_all(OptionError, problems)
    return plans


def assign(
    tables: Sequence[LayerOptions], layers: Sequence[WeightedNode], options: Options, plan: Plan, provider: str
) -> dict[str, tuple[Options, Plan]]:
    """Give every layer that tables match their options, and the plan they make, by layer name.

    Raises:
        OptionError: Options that are good in no kernel together, and layers of one weight that would get different ones.
    """
    options_of = {layer.name: _merged(tables, layer, options) for layer in layers}
    problems = []
    for readers in by_weight(layers):
        if any(options_of[layer.name] != options_of[readers[0].name] for layer in readers):
            names = ", ".join(layer.name for layer in readers)
            problems.append(f"{names} have one weight, {readers[0].weight_name}, and so the same options; match that name, or all of them")
    plans: dict[str, Plan] = {}
    assigned: dict[str, tuple[Options, Plan]] = {}
    for name, layer_options in options_of.items():
        if not layer_options:
            continue
        try:
            key = repr(sorted(layer_options.items()))
            if key not in plans:
                plans[key] = _plan(layer_options, options, plan, provider)
        except OptionError as error:
            problems.append(f"{name}: {error}")
            continue
        assigned[name] = layer_options, plans[key]
    raise_all(OptionError, problems)
    return assigned


def of_rewrites(layers: Iterable[LinearLayer], plan: Plan) -> dict[str, tuple[Options, Plan]]:
    """Give the layers whose bits a rewrite has set these bits, and the plan they make, by layer name."""
    if plan.quantize is None:
        return {}
    bits_of = {layer.name: bits for layer in layers if (bits := own_bits(layer)) is not None}
    quantize, alone = plan.quantize, replace(plan, magr=None, low_rank=None)
    plans = {bits: replace(alone, quantize=replace(quantize, bits=bits)) for bits in set(bits_of.values())}
    return {name: ({"bits": bits}, plans[bits]) for name, bits in bits_of.items()}


def check_matches(tables: Sequence[LayerOptions], layers: Sequence[WeightedNode], convolutions: Iterable[ConvLayer]) -> list[str]:
    """Refuse patterns that no layer has the name of.

    Returns:
        Notes about convolutions that a pattern matches beside layers, and about optional tables that reach nothing.

    Raises:
        OptionError: With every such pattern, and the names that are like it.
    """
    names = [names_of(layer.node, layer.name, layer.weight_name) for layer in layers]
    others = [names_of(layer.node, layer.name, layer.weight_name) for layer in convolutions]
    problems, notes = [], []
    for table in tables:
        if table.optional:
            if layers and not any(matches(aliases, table.match) for aliases in names):
                last = scope_of(layers[-1].node) or layers[-1].name
                notes.append(
                    f"no layer has a name like {' or '.join(table.match)}, which {described(table.options)} is for: {last} is the last one"
                )
            continue
        for pattern in table.match:
            if (text := unmatched(pattern, names, others)) is not None:
                problems.append(text)
            elif convs := _hits(pattern, others):
                matched = listed(convs)
                notes.append(f"options of layers {pattern!r} are not for convolutions, and it matches some ({matched}): see conv_bits")
    raise_all(OptionError, problems)
    return notes


def unmatched(pattern: str, names: Sequence[Sequence[str]], convolutions: Sequence[Sequence[str]]) -> str | None:
    """Explain that a table's pattern matches none of the layers to convert, by all their names; None where it matches one."""
    if _hits(pattern, names):
        return None
    if convs := _hits(pattern, convolutions):
        return f"layer options: {pattern!r} matches convolutions only ({listed(convs)}), and their bits are conv_bits, for all of them"
    return f"layer options: {pattern!r} matches no layer that is converted{near(pattern, names)}"


def _hits(pattern: str, names: Sequence[Sequence[str]]) -> list[str]:
    return [aliases[0] for aliases in names if matches(aliases, [pattern])]


def near(pattern: str, names: Sequence[Sequence[str]]) -> str:
    """End a message that a pattern matches no layer: with names that are like it, or with the first ones."""
    every = dict.fromkeys(name for aliases in names for name in aliases)
    ends = dict.fromkeys(aliases[0].rpartition(".")[2] for aliases in names)  # of paths of modules
    like = pattern.strip("*?")
    return (
        closest(like, every if "." in like else ends)
        or closest(like, every)
        or (f"; there are {listed([aliases[0] for aliases in names])}" if names else "; there are none")
    )


def described(options: Options) -> str:
    """Describe options, for the report."""
    return ", ".join(f"{name}={value}" for name, value in none_to_word(options).items())


def _merged(tables: Sequence[LayerOptions], layer: WeightedNode, options: Options) -> Options:
    """Merge the tables that match a layer; ``options`` are those of the run."""
    names = names_of(layer.node, layer.name, layer.weight_name)
    merged: dict[str, Any] = {}
    for table in tables:
        if matches(names, table.match):
            merged = merge_options(merged, table.options, options)
    return cast(Options, merged)


def _plan(layer_options: Options, options: Options, plan: Plan, provider: str) -> Plan:
    """Make the plan of a layer; ``options`` and ``plan`` are those of the run."""
    run_options: dict[str, Any] = {name: value for name, value in options.items() if name not in _BUDGETS}
    if any(options.get(name) is not None for name in _BUDGETS) and layer_options.get("bits") is None:
        raise OptionError("under a budget a layer's own options keep it out of the choice; give its bits too")
    if layer_options.get("quantizer") is not None:  # it takes the place of the effort here, and of no other layer's
        run_options |= {"effort": None, "feedback": plan.error_feedback is not None}
    merged = merge_options(run_options, layer_options, {})
    return plan_of(cast(Options, merged), provider=provider).suited(provider)


def _value(text: str) -> Any:
    """Read a value as TOML; what is none is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
