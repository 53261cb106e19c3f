"""`magr_onnx.optimize` for torch modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch

from magr_onnx.config import schema
from magr_onnx.config.arguments import argument
from magr_onnx.config.invocation import Invocation, defaults_of, plain, python_call, with_keywords, without_defaults
from magr_onnx.core.lazy import Lazy
from magr_onnx.errors import OptionError
from magr_onnx.integrations.torch.export import DynamicShapes, Examples, Exported, export
from magr_onnx.integrations.torch.feeds import SAMPLES, ToInputs, feeds
from magr_onnx.runtime.data.sources import Batches, DataReader, Source
from magr_onnx.runtime.ort.session import inputs_of
from magr_onnx.workflow.optimize import Optimized, run
from magr_onnx.workflow.request import resolve

_FROM_RECIPE = ("calibration", "output", "validation_data", "batch_size")


def optimize(
    model: torch.nn.Module | torch.onnx.ONNXProgram,
    example_inputs: Examples | None = None,
    *,
    calibration: Iterable[Any] | str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    validation_data: Iterable[Any] | str | os.PathLike[str] | None = None,
    to_inputs: ToInputs | None = None,
    samples: int | None = SAMPLES,
    batch_size: int | None = None,
    dynamic_shapes: DynamicShapes | Literal["batch"] = "batch",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    **options: Any,
) -> Optimized:
    """Export a module and quantize the exported model.

    Args:
        model: A module, exported in evaluation mode and not changed, or an ONNXProgram of ``torch.onnx.export(..., dynamo=True)``.
        example_inputs: Arguments of the module's forward: a tensor, a tuple, or a dict of keyword arguments. None for an ONNXProgram.
        calibration: A DataLoader, or anything `magr_onnx.integrations.torch.feeds` or `magr_onnx.runtime.data.sources` can read.
        output: Where to write the result; None for a recipe's, else the result stays in memory.
        validation_data: Held-out inputs in the same forms, to compare the float and the quantized model on.
        to_inputs: Extracts the inputs from a batch of any other form (see `magr_onnx.integrations.torch.feeds`).
        samples: Most samples read from a loader; None for all.
        batch_size: Most samples per batch; None for a recipe's, or 16.
        dynamic_shapes: See `magr_onnx.integrations.torch.export`.
        input_names: Names of the inputs; those of forward's parameters by default.
        output_names: Names of the outputs.
        opset_version: Opset of the export.
        **options: Options of `magr_onnx.optimize`.

    Raises:
        ExportError: torch cannot export the module.
        MagrError: Whatever `magr_onnx.optimize` raises.
    """
    arguments = with_keywords(locals(), "options")
    invocation = torch_call(optimize, arguments)
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise OptionError("example_inputs are needed to export a module: a tensor, a tuple, or a dict of forward's arguments")
        names: dict[str, Any] = {"input_names": input_names, "output_names": output_names, "opset_version": opset_version}
        make = partial(export, model, example_inputs, dynamic_shapes=dynamic_shapes, **names)
    else:
        make = partial(Exported, model, ())
    options |= {"calibration": calibration, "output": output, "validation_data": validation_data, "batch_size": batch_size}
    return run_exported(make, to_inputs, samples, options, invocation)


def torch_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Invocation:
    """Describe a call of a function of `magr_onnx.torch`, whose first argument is the module."""
    defaults = defaults_of(function)
    command = python_call(f"magr_onnx.torch.{function.__name__}", arguments, defaults)
    return Invocation(command, plain(without_defaults(arguments, defaults)), source=type(next(iter(arguments.values()))).__name__)


def run_exported(
    make: Callable[[], Exported], to_inputs: ToInputs | None, samples: int | None, options: Mapping[str, Any], invocation: Invocation
) -> Optimized:
    """Quantize the model that ``make`` exports, on batches of torch; ``make`` is called once, after options are checked.

    ``options`` are arguments of `magr_onnx.optimize`; those of `_FROM_RECIPE` that are None are left to the recipe.
    """
    exported = cache(make)
    arguments = {name: value for name, value in options.items() if value is not None or name not in _FROM_RECIPE}
    size = argument("batch_size", arguments)
    schema.check(samples=samples, batch_size=size)

    def source(batches: Any) -> Source:
        if isinstance(batches, str | os.PathLike | DataReader | Batches):
            return batches
        settings: dict[str, Any] = {"to_inputs": to_inputs, "samples": samples, "batch_size": size}
        return Lazy(lambda: feeds(batches, inputs_of(exported().model), **settings))

    arguments |= {name: source(arguments[name]) for name in ("calibration", "validation_data") if name in arguments}
    return run(resolve({**arguments, "model": Lazy(exported)}, invocation))
