"""Shapes of the values of a model on the first batch of some data."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.runtime.data.sources import Batches, run_batches


def first_shapes(model: ir.Model, names: Sequence[str], data: Batches, provider: str) -> dict[str, tuple[int, ...]]:
    """Run the model on the first batch of the data; return the shapes of the values called ``names``, in that order."""
    _, _, shapes = next(run_batches(shape_taps(model, names), data, provider))
    return {name: tuple(map(int, shape)) for name, shape in zip(names, shapes, strict=True)}
