"""What holds for a whole run, and does not change in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.passes import LinearLayer, Skip
from magr_onnx.passes.linear import find

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in total."""
Steps = Callable[[int, int], None]
"""The same of one stage."""


def stage(progress: Progress | None, name: str) -> Steps | None:
    """Progress of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a caller asked of a run beside the pipeline; see `magr_onnx.optimize`.

    Attributes:
        provider: Where to run.
        include: Patterns of the layers to convert; empty for all.
        exclude: Patterns of those to leave as they are.
        mask: The input that marks rows to count, if there is one.
        progress: Called during long work.
    """

    provider: str = "cpu"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    mask: str | None = None
    progress: Progress | None = None

    def find(self, model: ir.Model) -> tuple[list[LinearLayer], list[Skip]]:
        """The linear layers to convert, and the others with the reason."""
        return find(model, self.include, self.exclude)

    def stage(self, name: str) -> Steps | None:
        """Progress of one stage."""
        return stage(self.progress, name)
