"""Pages made from the code: ``<!-- generated: NAME -->`` in a page becomes the Markdown that a function here writes.

Nothing is written to disk, so nothing can go stale.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.typing import ExtensionMetadata

import magr_onnx
import magr_onnx.passes
from magr_onnx.cli.app import commands
from magr_onnx.config.options import KEYS, OPTIONS, PANELS
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import method_options
from magr_onnx.errors import MagrError
from magr_onnx.passes.base import Stage
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.registry import passes, stages

_MARK = re.compile(r"<!-- generated: ([\w ]+) -->")
_FIELD = re.compile(r"^    (\w+): (.*)$")


# --- Passes -------------------------------------------------------------------------------------------------------------


def _passes() -> Iterator[str]:
    """A section for every pass of the registry: summary, docstring, options, and what its file has to say."""
    for name, kind in stages().items():
        text, described = _described(kind)
        described |= {name: option.text for name, option in method_options().items()}
        alone = "" if name in passes() else ", a setting of a `Plan`, not a pass"
        where = f"`{_import_path(kind)}`{alone}"
        yield f"## {name}\n\n*{kind.summary[0].upper()}{kind.summary[1:]}.* In Python: {where}.\n\n{text}\n"
        if options := kind.options():
            yield "| option | default | |\n|---|---|---|"
            for option, (hint, default) in options.items():
                if option not in described:
                    raise ExtensionError(f"the docstring of {kind.__name__} does not describe its option {option}")
                yield f"| `{option}`<br>{_takes(hint)} | `{_shown(default)}` | {_cell(described[option])} |"
            yield ""
        if story := _story(kind):
            yield f"### How {name} works\n\n{story}\n"


def _import_path(kind: type[Stage]) -> str:
    """Where a pass is imported from: `magr_onnx.passes`, or its file if that does not export it."""
    exported = getattr(magr_onnx.passes, kind.__name__, None) is kind
    return f"{'magr_onnx.passes' if exported else kind.__module__}.{kind.__name__}"


def _described(kind: type[Stage]) -> tuple[str, dict[str, str]]:
    """The docstring of a pass without its fields, and the fields."""
    text, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    fields: dict[str, str] = {}
    last = ""
    for line in rest.splitlines():
        if match := _FIELD.match(line):
            last, fields[match[1]] = match[1], match[2]
        elif last and line.strip():
            fields[last] += " " + line.strip()
    return _plain(text).strip(), fields


def _story(kind: type[Stage]) -> str:
    """The docstring of a pass's file behind its first paragraph, if the file is about this pass alone."""
    module = sys.modules[kind.__module__]
    if sum(k.__module__ == kind.__module__ for k in stages().values()) > 1:
        return ""
    return _plain(inspect.cleandoc(module.__doc__ or "").partition("\n\n")[2])


def _takes(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " ".join(f"`{word}`" for word in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " ".join(_takes(part) for part in typing.get_args(hint))
    return "`none`" if hint is type(None) else {bool: "`true` `false`", int: "integer", float: "number", str: "text"}[hint]


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# --- The command line ----------------------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    """A section for every command: what it does, its arguments and options, its examples."""
    for name, command in commands().items():
        hints = typing.get_type_hints(command.callback)
        shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name in hints]
        arguments = " ".join(_argument(p) for p in shown if p.param_type_name == "argument")
        yield f"## onnx-magr {name}\n\n{_plain(_unmarked(command.help))}\n"
        yield f"```text\nonnx-magr {name} [OPTIONS] {arguments}\n```\n"
        yield from ("| | |", "|---|---|", *(_row(p, hints[p.name]) for p in shown), "")
        if examples := re.findall(r"^onnx-magr .*$", _unmarked(command.epilog), re.M):
            yield "```console\n" + "\n".join(f"$ {line}" for line in examples) + "\n```\n"


def _argument(parameter: Any) -> str:
    text = parameter.metavar or parameter.name.upper()
    return text if parameter.required else f"[{text}]"


def _row(parameter: Any, hint: Any) -> str:
    names = [_argument(parameter)] if parameter.param_type_name == "argument" else [*parameter.opts, *parameter.secondary_opts]
    hints = (*typing.get_args(hint), hint)
    choices = next((typing.get_args(h) for h in hints if typing.get_origin(h) is typing.Literal), ())
    takes = " ".join(f"`{c}`" for c in choices) or next(_KINDS[k] for h in hints if (k := typing.get_origin(h) or h) in _KINDS)
    default = parameter.default
    text = _cell(_unmarked(parameter.help))
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        text += f" (default: `{default}`)"
    return f"| {' '.join(f'`{n}`' for n in names)}{f'<br>{takes}' if takes else ''} | {text} |"


_KINDS = {bool: "", str: "text", int: "integer", float: "number", Path: "path", list: "text, may be repeated"}


def _unmarked(text: str | None) -> str:
    """Help text without the markup of the terminal."""
    return Text.from_markup(inspect.cleandoc(text or "")).plain


# --- Options -------------------------------------------------------------------------------------------------------------


def _options() -> Iterator[str]:
    """A table of options under each heading of ``--help``: what they take, their default, what they do, and to what."""
    for panel in PANELS:
        yield f"## {panel}\n\n| option | takes | default | |\n|---|---|---|---|"
        for option in KEYS.values():
            if option.panel == panel:
                default = option.default_text or ("" if option.default is None else f"`{_shown(option.default)}`")
                yield f"| `{option.name}` | {_values(option)} | {_cell(default)} | {_cell(' '.join([option.help, *_rules(option)]))} |"
        yield ""


def _values(option: OptionSpec) -> str:
    if option.choices:
        values = [f"`{choice}`" for choice in option.choices]
    else:
        kinds = {"path": "path", "paths": "paths", "patterns": "patterns", "size": "size"}
        values = [kinds.get(option.kind) or _takes(kind) for kind in option.types if kind is not type(None)]
    return " ".join([*values, *([] if option.none_word is None else [f"`{option.none_word}` (Python: `None`)"])])


def _rules(option: OptionSpec) -> Iterator[str]:
    """What an option is for, and what it displaces."""
    if option.argument:
        yield f"In Python: {option.argument}."
    for form in FORMATS.values():
        if option.name in form.exclusive_options:
            yield f"Only for format {form.name}."
    if option.displaces:
        yield f"Overrides {', '.join(option.displaces)} given earlier."
    if option.belongs_to is not None:
        yield f"Dropped by a later change of {option.belongs_to}."
    if option.name in OPTIONS and option.whole_run is None:
        yield "May differ by layer."


# --- Python --------------------------------------------------------------------------------------------------------------


def _exported(directive: str, selects: Callable[[Any], bool]) -> Iterator[str]:
    """What `magr_onnx` exports of one kind, by the docstrings."""
    yield "```{eval-rst}\n.. currentmodule:: magr_onnx\n"
    for name in magr_onnx.__all__:
        if selects(value := getattr(magr_onnx, name)):
            yield f".. {directive} {name}"
            if _is_error(value):
                yield "   :show-inheritance:"
            if fields := getattr(value, "_fields", ()):  # of a named tuple: the docstring describes them
                yield f"   :exclude-members: __new__, {', '.join(fields)}"
    yield "```\n"


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, MagrError)


def _presets() -> Iterator[str]:
    yield from ("| preset | for | sets |", "|---|---|---|")
    yield from (f"| `{preset.name}` | {_cell(preset.summary)} | {_cell(str(preset))} |" for preset in magr_onnx.PRESETS.values())
    yield ""


# --- Files beside docs/ -------------------------------------------------------------------------------------------------


def _root(name: str) -> Iterator[str]:
    """A page that lies at the root of the repository, its links as they are from here."""
    text = (Path(__file__).parents[2] / name).read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    yield re.sub(r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda m: f"]({m[1].lower()}.md", text)


# --- Both ----------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Docstring text as Markdown: the two agree but for references with a tilde and headings, which docstrings have none of."""
    return textwrap.dedent(text).replace("`~", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


GENERATORS: dict[str, Callable[[], Iterator[str]]] = {
    "passes": _passes,
    "command line": _commands,
    "options": _options,
    "functions": partial(_exported, "autofunction::", inspect.isfunction),
    "classes": partial(_exported, "autoclass::", lambda value: inspect.isclass(value) and not _is_error(value)),
    "errors": partial(_exported, "autoexception::", _is_error),
    "presets": _presets,
    "contributing": partial(_root, "CONTRIBUTING.md"),
    "changelog": partial(_root, "CHANGELOG.md"),
}


def _insert(app: Sphinx, page: str, source: list[str]) -> None:
    def text(match: re.Match[str]) -> str:
        if match[1] not in GENERATORS:
            raise ExtensionError(f"{page}: nothing generates {match[1]!r}; there are {', '.join(GENERATORS)}")
        return "\n".join(GENERATORS[match[1]]())

    source[0] = _MARK.sub(text, source[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect to pages as they are read."""
    app.connect("source-read", _insert)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
