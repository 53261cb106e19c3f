"""torch.onnx.export with what users of this package expect: evaluation mode, any batch size, errors that say what to do."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from magr_onnx.errors import ExportError, OptionError

Examples = torch.Tensor | Sequence[Any] | Mapping[str, Any]
DynamicShapes = Any
"""As `torch.onnx.export` takes it; None for fixed shapes, ``"batch"`` for a first axis of any size."""


class Exported(NamedTuple):
    """What `export` returns: the program, and notes for the report."""

    program: torch.onnx.ONNXProgram
    notes: tuple[str, ...]


def export(
    model: torch.nn.Module,
    example_inputs: Examples,
    *,
    dynamic_shapes: DynamicShapes | Literal["batch"] = "batch",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    fold: bool = True,
) -> Exported:
    """Export a module in evaluation mode; the module is left as it was.

    A module with bfloat16 weights is exported as a float32 copy: onnxruntime has few bfloat16 kernels.

    Args:
        model: The module.
        example_inputs: A tensor, the positional arguments as a tuple or list, or the keyword arguments as a dict.
        dynamic_shapes: As `torch.onnx.export` takes it, None for the shapes of the example; ``"batch"`` (default) lets the first axis of
            all tensors vary together, and falls back on the shapes of the example where the module does not allow it, with a note.
        input_names: Names of the inputs; those of forward's parameters by default.
        output_names: Names of the outputs.
        opset_version: Opset; None for the exporter's default.
        fold: Let the exporter fold constants. Without, initializers are the parameters, under their names.

    Raises:
        ExportError: torch cannot export the module; the message has its reason and what to try.
        OptionError: The example is empty.
    """
    args, kwargs = _arguments(example_inputs)
    notes = []
    with _evaluating(model):
        source = model
        if any(p.dtype == torch.bfloat16 for p in model.parameters()):
            source = copy.deepcopy(model).float()
            notes.append("bfloat16 weights were exported as float32, which onnxruntime has kernels for")
        kind, device = _placement(source)
        args = tuple(_placed(a, kind, device) for a in args)
        kwargs = {k: _placed(a, kind, device) for k, a in kwargs.items()}
        names = {"input_names": input_names, "output_names": output_names, "opset_version": opset_version, "optimize": fold}
        if not isinstance(dynamic_shapes, str):
            return Exported(_run(source, args, kwargs, dynamic_shapes, names), tuple(notes))
        if dynamic_shapes != "batch":
            raise OptionError(f"dynamic_shapes={dynamic_shapes!r}: give 'batch', None, or what torch.onnx.export takes")
        program, why = _any_batch(source, args, kwargs, names)
        if program is not None:
            return Exported(program, tuple(notes))
        notes.append(f"shapes are fixed to those of the example, the batch size too: {why}; dynamic_shapes says what may vary")
        return Exported(_run(source, args, kwargs, None, names), tuple(notes))


def _arguments(example: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, torch.Tensor):
        return (example,), {}
    args, kwargs = ((), dict(example.items())) if isinstance(example, Mapping) else (tuple(example), {})
    if not args and not kwargs:
        raise OptionError("example_inputs is empty; give the arguments of the module's forward: a tensor, a tuple or a dict")
    return args, kwargs


def _placement(model: torch.nn.Module) -> tuple[torch.dtype | None, torch.device | None]:
    """The type and device of a module's weights."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (None, None) if first is None else (first.dtype, first.device)


def _placed(value: Any, kind: torch.dtype | None, device: torch.device | None) -> Any:
    """A tensor where the weights are, and a half-precision one in their type if theirs is another."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().to(device) if device is not None else value.detach()
    return value.to(kind) if kind is not None and value.dtype == torch.bfloat16 else value


def _batch_of(values: Sequence[Any]) -> int | None:
    """The common size of the first axis of all tensors; None where there is none."""
    sizes = {v.shape[0] if v.ndim else None for v in values if isinstance(v, torch.Tensor)}
    plain = all(v is None or isinstance(v, torch.Tensor | bool | int | float | str) for v in values)
    return next(iter(sizes)) if len(sizes) == 1 and plain else None


def _doubled(value: Any, size: int) -> Any:
    """A batch of two instead of one, which torch.export would take for a constant."""
    return torch.cat([value, value]) if size == 1 and isinstance(value, torch.Tensor) else value


def _any_batch(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Mapping[str, Any]
) -> tuple[torch.onnx.ONNXProgram | None, str]:
    """The program for batches of any size, or None and why there is none."""
    size = _batch_of([*args, *kwargs.values()])
    if size is None:
        return None, "the tensors of the example do not share their first axis"
    batch = torch.export.Dim("batch")

    def axes(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) else None

    shapes = {k: axes(v) for k, v in kwargs.items()} if kwargs else tuple(map(axes, args))
    try:
        program = _run(model, tuple(_doubled(a, size) for a in args), {k: _doubled(a, size) for k, a in kwargs.items()}, shapes, names)
    except ExportError as error:
        return None, _reason(error)
    fixed = [str(v.name) for v in program.model.graph.inputs if v.shape is not None and len(v.shape) and isinstance(v.shape[0], int)]
    return (None, f"the module asks for this size of {', '.join(fixed)}") if fixed else (program, "")


def _run(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, names: Mapping[str, Any]) -> Any:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it says of packages the module does not use
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch
            program = torch.onnx.export(model, args, kwargs=kwargs or None, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            assert program is not None
            return program
    except Exception as error:
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}; see what torch.onnx.export(..., dynamo=True, "
            "report=True) writes; control flow that depends on values needs torch.cond, and shapes that must not vary dynamic_shapes=None; "
            "or export it by other means and give magr_onnx.optimize the file"
        ) from error
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first error in a chain, shortly: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and every submodule's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
