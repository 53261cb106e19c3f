"""`magr_onnx.optimize` for torch modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from magr_onnx import api
from magr_onnx.boundary import explained
from magr_onnx.errors import OptionError
from magr_onnx.runtime.data import Batches, DataReader, Source
from magr_onnx.runtime.session import InputInfo, inputs_of
from magr_onnx.torch.export import DynamicShapes, Examples, Exported, export
from magr_onnx.torch.feeds import SAMPLES, ToInputs, feeds


@explained
def optimize(
    model: torch.nn.Module | torch.onnx.ONNXProgram,
    example_inputs: Examples | None = None,
    *,
    calibration: Iterable[Any] | str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    validation_data: Iterable[Any] | str | os.PathLike[str] | None = None,
    to_inputs: ToInputs | None = None,
    samples: int | None = SAMPLES,
    batch_size: int = 16,
    dynamic_shapes: DynamicShapes | Literal["batch"] = "batch",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    **options: Any,
) -> api.Optimized:
    """Export a module and quantize what comes out of it.

    Args:
        model: A module, which is exported in evaluation mode and left as it was, or what ``torch.onnx.export(..., dynamo=True)`` returned.
        example_inputs: Arguments of the module's forward: a tensor, a tuple, or a dict of keyword arguments. None for an ONNXProgram.
        calibration: A DataLoader, or anything `magr_onnx.torch.feeds` or `magr_onnx.runtime.data` can read.
        output: Where to write the result; None keeps it in memory.
        validation_data: Held-out inputs in the same forms, to compare the float and the quantized model on.
        to_inputs: What of a batch is input, where that is not clear by itself (see `magr_onnx.torch.feeds`).
        samples: How many samples of a loader are enough; None for all.
        batch_size: Most samples run at a time.
        dynamic_shapes: See `magr_onnx.torch.export`.
        input_names: Names of the inputs; those of forward's parameters by default.
        output_names: Names of the outputs.
        opset_version: Opset of the export.
        **options: Of `magr_onnx.optimize`.

    Raises:
        ExportError: torch cannot export the module.
        MagrError: Whatever `magr_onnx.optimize` raises.
    """
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise OptionError("example_inputs are needed to export a module: a tensor, a tuple, or a dict of forward's arguments")
        names: dict[str, Any] = {"input_names": input_names, "output_names": output_names, "opset_version": opset_version}
        exported = export(model, example_inputs, dynamic_shapes=dynamic_shapes, **names)
    else:
        exported = Exported(model, ())
    return optimized(exported, calibration, validation_data, to_inputs, samples, batch_size, {**options, "output": output})


def optimized(
    exported: Exported,
    calibration: Any,
    validation_data: Any,
    to_inputs: ToInputs | None,
    samples: int | None,
    batch_size: int,
    options: Mapping[str, Any],
) -> api.Optimized:
    """`magr_onnx.optimize` on batches of torch, with the notes on the export in the report."""
    inputs = inputs_of(exported.program.model)
    data, held = (_source(s, inputs, to_inputs, samples, batch_size) for s in (calibration, validation_data))
    result = api.optimize(exported.program, data, validation_data=held, batch_size=batch_size, **options)
    return result._replace(report=replace(result.report, notes=(*exported.notes, *result.report.notes)))


def _source(source: Any, inputs: Sequence[InputInfo], to_inputs: ToInputs | None, samples: int | None, batch_size: int) -> Source | None:
    if source is None or isinstance(source, str | os.PathLike | DataReader | Batches):
        return source
    return feeds(source, inputs, to_inputs=to_inputs, samples=samples, batch_size=batch_size)
