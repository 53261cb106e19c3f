"""The floats that labels, indices and text are made from: outputs that change in steps say little of how close two models are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.inference import inferred_types
from magr_onnx.passes.instrument.taps import Extension


def last_floats(model: ir.Model) -> list[str]:
    """Find the floats nearest before the outputs of a model that puts out none, in its main graph.

    Returns:
        Names of values; none where an output has floats, or no types before it are known.
    """
    if puts_out_floats(model):
        return []
    types = inferred_types(model)

    def has_floats(value: ir.Value) -> bool:
        dtype = types.get(str(value.name))
        return dtype is not None and dtype.is_floating_point()

    queue = dict.fromkeys(model.graph.outputs)
    if any(map(has_floats, queue)):
        return []
    found, waiting = list[str](), list(queue)
    while waiting:
        value = waiting.pop(0)
        if (maker := value.producer()) is None:
            continue
        if has_floats(value):
            found.append(str(value.name))
            continue
        new = [source for source in maker.inputs if source is not None and source not in queue]
        queue |= dict.fromkeys(new)
        waiting += new
    return found


def puts_out_floats(model: ir.Model) -> bool:
    """Whether an output is declared to have floats."""
    return any(value.dtype is not None and value.dtype.is_floating_point() for value in model.graph.outputs)


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model | None:
    """Copy a model to put out values of its main graph, flat and as float32, in place of its outputs; None where it lacks one."""
    copy = Extension(model)
    if not copy.values.keys() >= set(names):
        return None
    flat = copy.constant("__last_floats_shape", np.array([-1], np.int64))
    for i, name in enumerate(names):
        reals = copy.add("Cast", [copy.values[name]], f"__last_floats_{i}", to=ir.DataType.FLOAT)
        copy.output(copy.add("Reshape", [reals, flat], f"__last_floats_flat_{i}"))
    return copy.finish()
