"""What holds for a whole run, and does not change in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.passes import LinearLayer, Skip
from magr_onnx.passes.layers.linear import find
from magr_onnx.report.data import LayerRow

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in total."""
OnLayer = Callable[[LayerRow], None]
"""Called with what the report will say of a layer that is finished."""
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
        on_layer: Called with every finished layer.
        tables: Options of single layers.
    """

    provider: str = "cpu"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    mask: str | None = None
    progress: Progress | None = None
    on_layer: OnLayer | None = None
    tables: Sequence[LayerOptions] = ()

    def find(self, model: ir.Model) -> tuple[list[LinearLayer], list[Skip]]:
        """The linear layers to convert, and the others with the reason."""
        return find(model, self.include, self.exclude)

    def stage(self, name: str) -> Steps | None:
        """Progress of one stage."""
        return stage(self.progress, name)

    def finished(self, rows: Iterable[LayerRow]) -> None:
        """Say that layers are finished."""
        if self.on_layer is not None:
            for row in rows:
                self.on_layer(row)
