"""Links from pages to files outside docs/: on the site they become the file's name, since the site holds pages only."""

from __future__ import annotations

import re

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+(?!docs/)[^)#]+)\)")


def _unlink(app: Sphinx, page: str, source: list[str]) -> None:
    def text(match: re.Match[str]) -> str:
        target = (app.srcdir / page).parent / match[2]
        return match[0] if target.resolve().is_relative_to(app.srcdir) else match[1]

    source[0] = _OUTSIDE.sub(text, source[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect to pages as they are read."""
    app.connect("source-read", _unlink)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
