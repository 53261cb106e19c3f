"""Export of torch modules: torch.onnx.export in evaluation mode, for any batch size, with errors that suggest remedies."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from magr_onnx.errors import ExportError, MagrError, OptionError
from magr_onnx.integrations.torch.feeds import feeds
from magr_onnx.runtime.ort.session import Session

Examples = torch.Tensor | Sequence[Any] | Mapping[str, Any]
DynamicShapes = Any
"""As in `torch.onnx.export`; None for fixed shapes, ``"batch"`` for a dynamic first axis."""


class Exported(NamedTuple):
    """An exported program, with notes for the report."""

    program: torch.onnx.ONNXProgram
    notes: tuple[str, ...]

    @property
    def model(self) -> ir.Model:
        """The graph of the program."""
        return self.program.model


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
    """Export a module in evaluation mode, without changing it.

    A module with bfloat16 weights is exported as a float32 copy: onnxruntime has few bfloat16 kernels.

    Args:
        model: The module.
        example_inputs: A tensor, the positional arguments as a tuple or list, or the keyword arguments as a dict.
        dynamic_shapes: As in `torch.onnx.export`, or None for the shapes of the example. ``"batch"`` (default) makes the first axis of all
            tensors one dynamic dimension; it falls back to the shapes of the example, with a note, if the module does not allow that, or
            treats the example, a batch of one, differently.
        input_names: Names of the inputs; those of forward's parameters by default.
        output_names: Names of the outputs; by default the keys, if forward returns a dict or dataclass (``key_0``, ``key_1`` for a key with
            several tensors).
        opset_version: Opset; None for the exporter's default.
        fold: Whether the exporter folds constants; else initializers are the parameters, under their names.

    Raises:
        ExportError: The module does not run on the example, or torch cannot export it; the message has the reason and what to try.
        OptionError: The example is empty, or there are more names than inputs or outputs.
    """
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "batch":
        raise OptionError(f"dynamic_shapes={dynamic_shapes!r}: give 'batch', None, or what torch.onnx.export takes")
    args, kwargs = _arguments(example_inputs)
    notes = [
        f"the result has an input {name!r}, which the example gave: leave it out of example_inputs if the file is not to ask for it"
        for name in kwargs
        if name in _LABELS
    ]
    with _evaluating(model):
        source = model
        if any(p.dtype == torch.bfloat16 for p in model.parameters()):
            source = copy.deepcopy(model).float()
            notes.append("bfloat16 weights were exported as float32, which onnxruntime has kernels for")
        kind, device = _placement(source)
        args = tuple(_placed(a, kind, device) for a in args)
        kwargs = {k: _placed(a, kind, device) for k, a in kwargs.items()}
        expected = _outputs(_forward(source, args, kwargs))
        outputs = [name for name, _ in expected]
        _check_names("input_names", input_names, "inputs", pytree.tree_leaves((args, kwargs)))
        _check_names("output_names", output_names, "outputs", outputs)
        names = {"input_names": input_names, "output_names": output_names, "opset_version": opset_version, "optimize": fold}
        program = None
        if isinstance(dynamic_shapes, str):
            dynamic_shapes = None
            program, reason = _any_batch(source, args, kwargs, names, expected)
            if program is None:
                notes.append(f"shapes are fixed to those of the example, the batch size too: {reason}; dynamic_shapes says what may vary")
        program = program or _run(source, args, kwargs, dynamic_shapes, names)
        if output_names is None:
            _name_outputs(program, outputs)
        return Exported(program, tuple(notes))


_LABELS = ("label", "labels", "target", "targets")


def _forward(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run forward on the example, preserving buffers and random states.

    Its errors are clearer than those of torch.export, which are about internals.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller knows them from running the module
            return model(*args, **kwargs)
    except Exception as error:
        parameters = inspect.signature(model.forward).parameters.values()
        expected = [p.name if p.default is p.empty else f"{p.name} (optional)" for p in parameters]
        raise ExportError(
            f"{type(model).__name__} does not run on example_inputs: {_reason(error)}; forward takes {', '.join(expected) or 'nothing'}; "
            "give a tensor, a tuple of arguments, or a dict by these names"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not ((buffer == value) | (buffer.isnan() & value.isnan())).all():  # views of one element cannot be written to
                    buffer.copy_(value)


def _outputs(value: Any) -> list[tuple[str, torch.Tensor]]:
    """List the tensors that forward returned, by name; the name is empty if there is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    parts = {str(key): _tensors(part) for key, part in value.items()} if isinstance(value, Mapping) else {"": _tensors(value)}
    return [(f"{key}_{i}" if key and len(part) > 1 else key, tensor) for key, part in parts.items() for i, tensor in enumerate(part)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _check_names(option: str, names: Sequence[str] | None, kind: str, tensors: Sequence[Any]) -> None:
    if names is not None and len(names) > len(tensors):
        module_names = [name for name in tensors if isinstance(name, str) and name]
        known = f" ({', '.join(module_names)})" if module_names else ""
        raise OptionError(f"{option} has {len(names)} names ({', '.join(names)}), and the module has {len(tensors)} {kind}{known}")


def _name_outputs(program: torch.onnx.ONNXProgram, names: Sequence[str]) -> None:
    """Name the outputs as forward does, if all of these names are unused and every output is a separate value."""
    graph = program.model.graph
    outputs = graph.outputs
    used_names = {v.name for node in graph.all_nodes() for v in node.outputs} | {v.name for v in graph.inputs} | set(graph.initializers)
    used_names -= {v.name for v in outputs}
    separate = all(v.producer() is not None for v in outputs) and len(set(outputs)) == len(outputs)
    if separate and len(names) == len(outputs) and all(names) and len(set(names)) == len(names) and not used_names & set(names):
        for value, name in zip(outputs, names, strict=True):
            value.name = name


def _arguments(example: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, torch.Tensor):
        return (example,), {}
    args, kwargs = ((), dict(example.items())) if isinstance(example, Mapping) else (tuple(example), {})
    if not args and not kwargs:
        raise OptionError("example_inputs is empty; give the arguments of the module's forward: a tensor, a tuple or a dict")
    return args, kwargs


def _placement(model: torch.nn.Module) -> tuple[torch.dtype | None, torch.device | None]:
    """Return the type and device of a module's weights."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (None, None) if first is None else (first.dtype, first.device)


def _placed(value: Any, kind: torch.dtype | None, device: torch.device | None) -> Any:
    """Move a tensor to the device of the weights, and cast bfloat16 to their type."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().to(device) if device is not None else value.detach()
    return value.to(kind) if kind is not None and value.dtype == torch.bfloat16 else value


def _batch_of(values: Sequence[Any]) -> int | None:
    """Return the common size of the first axis of all tensors; None if they differ."""
    sizes = {v.shape[0] if v.ndim else None for v in values if isinstance(v, torch.Tensor)}
    plain = all(v is None or isinstance(v, torch.Tensor | bool | int | float | str) for v in values)
    return next(iter(sizes)) if len(sizes) == 1 and plain else None


def _doubled(value: Any, size: int) -> Any:
    """Double a batch of one, whose size torch.export would treat as a constant."""
    return torch.cat([value, value]) if size == 1 and isinstance(value, torch.Tensor) else value


def _any_batch(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Mapping[str, Any],
    outputs: Sequence[tuple[str, torch.Tensor]],
) -> tuple[torch.onnx.ONNXProgram | None, str]:
    """Export for any batch size; return None and the reason if that fails. ``outputs`` are those of the module for the example."""
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
    if fixed:
        return None, f"the module asks for this size of {', '.join(fixed)}"
    difference = _difference(program, _tensors((args, kwargs)), outputs) if size == 1 else ""
    return (None, difference) if difference else (program, "")


def _difference(program: torch.onnx.ONNXProgram, inputs: Sequence[torch.Tensor], outputs: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Describe how a program traced with two samples differs from the module on the example, one sample; empty if it does not."""
    names = [str(v.name) for v in program.model.graph.inputs]
    try:
        with Session(program.model) as session:
            (feed,) = feeds([dict(zip(names, inputs, strict=True))], session.inputs)
            results = session.run(feed)
    except (MagrError, ValueError) as error:
        return f"a graph made for any batch does not run with the example's one sample: {_reason(error)}"
    differing = [name or f"output {i}" for i, (a, (name, b)) in enumerate(zip(results, outputs, strict=False)) if not _close(a, b)]
    if not differing and len(results) == len(outputs):
        return ""
    values = ", ".join(differing) or "other outputs"
    return f"with one sample, as in the example, the module computes {values} differently than with more; give an example of two samples"


def _close(exported: npt.NDArray[Any], expected: torch.Tensor) -> bool:
    """Whether two results agree up to the rounding of different kernels, possibly in half precision or on a GPU."""
    exact = expected.device.type == "cpu" and expected.dtype in (torch.float32, torch.float64)
    a, b = np.asarray(exported, np.float64), expected.detach().cpu().double().numpy()
    if a.shape != b.shape or not expected.is_floating_point():
        return np.array_equal(a, b)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return False
    return bool(np.linalg.norm(a[finite] - b[finite]) <= (1e-3 if exact else 3e-2) * np.linalg.norm(b[finite]) + 1e-6)


def _run(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, names: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad(), _silence():
            program = torch.onnx.export(model, args, kwargs=kwargs or None, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            assert program is not None
            return program
    except Exception as error:
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX: {(reason := _reason(error))}; {_remedy(reason, model)}; "
            "or export it by other means and give magr_onnx.optimize the file"
        ) from error


_REMEDIES = {
    ("data-dependent", "GuardOnDataDependent"): "forward branches on values of tensors, which a graph says with torch.cond or torch.where",
    ("No ONNX function", "DispatchError"): "ONNX has no such operator: compute it with others, or give torch.onnx.export a "
    "custom_translation_table, and the program it returns to magr_onnx.torch.optimize",
    (
        "Constraints violated",
        "ConstraintViolation",
        "specializ",
    ): "a shape cannot vary as dynamic_shapes says; dynamic_shapes=None fixes all",
}


def _remedy(reason: str, model: torch.nn.Module) -> str:
    """Suggest a remedy for an error of the exporter."""
    remedies = [remedy for signs, remedy in _REMEDIES.items() if any(sign in reason for sign in signs)]
    parameters = inspect.signature(model.forward).parameters
    if ambiguous := [name for name, _ in model.named_children() if name in parameters]:
        remedies.append(
            f"{', '.join(ambiguous)}: a submodule and an argument of forward have this name, which the exporter confuses; rename one"
        )
    return remedies[0] if remedies else "torch.onnx.export(..., dynamo=True, report=True) writes more about it"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output of torch: missing packages that the module does not use, its own deprecations, traces of failed attempts."""
    names = ["torch", *(name for name in logging.root.manager.loggerDict if name.startswith("torch."))]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger, level in levels.items():
            if level or logger.name == "torch":  # others inherit their level
                logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


_ADVICE = re.compile(r"\s*(For more information about this error, see:|The error above occurred when calling).*", re.DOTALL)


def _reason(error: BaseException) -> str:
    """Shorten the first error in a chain, which the exporter wraps in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ADVICE.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {textwrap.shorten(' '.join(lines[:3]), 400, placeholder=' ...')}"


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of every submodule afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
