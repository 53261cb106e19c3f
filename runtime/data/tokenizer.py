"""Tokenizers beside models: text to tokens and back, and chats to text by the model's own template.

Reads ``tokenizer.json`` of the package tokenizers, ``tokenizer_config.json`` and ``chat_template.jinja``, as transformers writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from magr_onnx.errors import CalibrationError, DependencyError, install

TOKENIZER = "tokenizer.json"
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
WRITER = "AutoTokenizer.from_pretrained(...).save_pretrained(folder), of transformers, writes one"
_CONTEXT = ("context_length", "max_position_embeddings", "n_positions")  # of genai_config.json and config.json


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer, with what its folder says of special tokens, of chats and of the model's context.

    Attributes:
        file: Its ``tokenizer.json``.
        tool: A ``tokenizers.Tokenizer``, without truncation and padding.
        config: Contents of ``tokenizer_config.json``; empty where there is none.
        prefix: Tokens that begin every sequence.
        suffix: Tokens that end every sequence.
    """

    file: Path
    tool: Any
    config: Mapping[str, Any]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @staticmethod
    def open(file: Path) -> Tokenizer:
        """Open a ``tokenizer.json``, or the one in a folder.

        Raises:
            CalibrationError: There is none, or it cannot be read.
            DependencyError: The package tokenizers is not installed.
        """
        file = file / TOKENIZER if file.is_dir() else file
        if not file.is_file():
            raise CalibrationError(f"there is no tokenizer {file}; {WRITER}")
        try:
            from tokenizers import Tokenizer as Tool
        except ImportError:
            raise DependencyError(f"text needs the package tokenizers; {install('text')}") from None
        try:
            tool = Tool.from_file(str(file))
        except Exception as error:  # the library raises plain exceptions
            raise CalibrationError(f"{file} is not a tokenizer that the package tokenizers can read: {error}; {WRITER}") from error
        tool.no_padding()
        tool.no_truncation()
        config = _json(file.with_name(CONFIG))
        prefix, suffix = _around(tool)
        first = _id(tool, config.get("bos_token"))
        if not prefix and first is not None and config.get("add_bos_token") is True:
            prefix = (first,)
        return Tokenizer(file, tool, config, prefix, suffix)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, without the tokens that begin and end a sequence."""
        return [self.bare(encoding.ids) for encoding in self.tool.encode_batch(list(texts), add_special_tokens=False)]

    def bare(self, ids: Sequence[int]) -> list[int]:
        """Remove the tokens that begin a sequence, which chat templates write too."""
        return list(ids[len(self.prefix) :] if tuple(ids[: len(self.prefix)]) == self.prefix else ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, without special ones."""
        return str(self.tool.decode(list(ids)))

    @property
    def padding(self) -> int:
        """Id of the padding token; 0 where there is none, as any id will do where the mask is zero."""
        return _id(self.tool, self.config.get("pad_token")) or 0

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a text: those that ``genai_config.json``, ``generation_config.json`` and `CONFIG` name."""
        folder = self.file.parent
        model = _json(folder / "genai_config.json").get("model")
        sources = (model if isinstance(model, dict) else {}, _json(folder / "generation_config.json"))
        values = [value for source in sources for value in _listed(source.get("eos_token_id"))]
        return frozenset(value for value in (*values, _id(self.tool, self.config.get("eos_token"))) if isinstance(value, int))

    @property
    def end(self) -> int | None:
        """Id of the token between documents; None where there is none."""
        return _id(self.tool, self.config.get("eos_token"))

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence that the files beside the tokenizer allow; None where they do not say."""
        folder = self.file.parent
        model = _json(folder / "genai_config.json").get("model")
        sources = (model if isinstance(model, dict) else {}, _json(folder / "config.json"))
        values = [self.config.get("model_max_length"), *(source.get(name) for source in sources for name in _CONTEXT)]
        lengths = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 1 <= v < 1e9]  # 1e30: unknown
        return int(min(lengths)) if lengths else None

    def chat(self, messages: Sequence[Mapping[str, Any]], answer: bool = False) -> str:
        """Write a chat as the model's template has it, as transformers does.

        Args:
            messages: Each with ``role`` and ``content``.
            answer: Whether to end with what begins the model's answer.

        Raises:
            CalibrationError: There is no template, or it refuses the chat.
            DependencyError: The package jinja2 is not installed.
        """
        template = self._template()
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DependencyError(f"chats need the package jinja2; {install('text')}") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
        names = {name: _content(token) for name, token in self.config.items() if name.endswith("_token") and _content(token)}
        marks = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # they change no text
        try:
            return environment.from_string(marks).render(messages=messages, add_generation_prompt=answer, **names)
        except Exception as error:  # whatever the template does with messages that it does not expect
            raise CalibrationError(f"the chat template of {self.file.parent} refuses it: {error}") from error

    def _template(self) -> str:
        file = self.file.with_name(TEMPLATE)
        template = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template")
        if isinstance(template, list):
            by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = by_name.get("default", next(iter(by_name.values()), None))
        if not isinstance(template, str):
            raise CalibrationError(f"there is no chat template in {self.file.parent} ({TEMPLATE}, or chat_template in {CONFIG}); give text")
        return template


def _around(tool: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the tokens that a tokenizer puts before and behind a text."""
    inner, whole = (list(tool.encode("a", add_special_tokens=special).ids) for special in (False, True))
    starts = (i for i in range(len(whole) - len(inner) + 1) if inner and whole[i : i + len(inner)] == inner)
    at = next(starts, None)
    return ((), ()) if at is None else (tuple(whole[:at]), tuple(whole[at + len(inner) :]))


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _id(tool: Any, token: Any) -> int | None:
    """Return the id of a special token, as `CONFIG` writes it; None where there is none."""
    text = _content(token)
    number: int | None = None if text is None else tool.token_to_id(text)
    return number
