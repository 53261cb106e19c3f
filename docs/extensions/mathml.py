"""Formulas as MathML, which browsers draw by themselves: no script, no font and no network.

A formula that docutils cannot convert is an error.
"""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

_BARS = re.compile(r"<mo[^>]*>([|‖])</mo>")  # which browsers take for infix operators, with space around them, and stretch


def _formula(node: nodes.math | nodes.math_block, as_block: bool) -> str:
    try:
        formula = str(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        raise ExtensionError(f"formula {node.astext()!r} in {node.source}: {error}") from error
    return _BARS.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', formula)


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_formula(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-scroll">{_formula(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
