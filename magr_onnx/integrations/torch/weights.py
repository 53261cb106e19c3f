"""MagR for a torch module: smaller weights at nearly the same outputs, written back to the parameters.

The module is exported without constant folding, so that ONNX initializers are parameters under their names. A parameter is written only if

1. an initializer of its name, or of that of a parameter it is tied to, has the same bits;
2. every node that reads it is a linear layer that MagR changed (which excludes an embedding table tied to the last layer's weight: the
   embeddings would change too);
3. the weight of that layer is the parameter or its transpose, bit by bit.

Other parameters are not changed, and listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from magr_onnx.config import schema
from magr_onnx.config.arguments import RunArguments
from magr_onnx.config.invocation import defaults_of, with_keywords
from magr_onnx.errors import ModelError, OptionError, closest, raise_all, translate_resource_errors
from magr_onnx.integrations.torch.export import DynamicShapes, Examples, export
from magr_onnx.integrations.torch.feeds import SAMPLES, ToInputs
from magr_onnx.integrations.torch.interface import run_exported, torch_call
from magr_onnx.model_io import files
from magr_onnx.passes import LinearLayer, MagR, canonicalize, find
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.report.data import Report
from magr_onnx.workflow.optimize import Optimized

Array = npt.NDArray[Any]
_SETTINGS = (RunArguments.__annotations__.keys() | {"validation_data"}) - {"pipeline_text"}
_LAYOUT_OPS = ("Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Cast")


@dataclass(frozen=True, slots=True)
class Change:
    """A changed parameter.

    Attributes:
        name: Name in the state dict; the first of tied parameters.
        tied: Other names of the same parameter.
        layers: ONNX names of the layers that read it.
        before: Largest magnitude before.
        after: Largest magnitude after.
        error: Relative error of layer outputs on the calibration data, the largest of all layers.
    """

    name: str
    tied: tuple[str, ...]
    layers: tuple[str, ...]
    before: float
    after: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Reduced:
    """Result of MagR on a module.

    Attributes:
        changed: Parameters with new values.
        unchanged: Why other weights of two or more axes were not changed, by name.
        report: Report of the run on the exported model.
    """

    changed: tuple[Change, ...]
    unchanged: dict[str, str]
    report: Report

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} parameters changed, {len(self.unchanged)} left as they are"]
        lines += [f"  {c.name}: largest magnitude {c.before:.4g} -> {c.after:.4g}" for c in self.changed]
        lines += [f"  {name}: {reason}" for name, reason in self.unchanged.items()]
        return "\n".join(lines)


def magr(
    module: torch.nn.Module,
    example_inputs: Examples,
    calibration: Iterable[Any],
    *,
    alpha: float = 1e-3,
    relative: bool = True,
    block_size: int | None = None,
    damping: float | None = None,
    to_inputs: ToInputs | None = None,
    samples: int | None = SAMPLES,
    batch_size: int | None = None,
    dynamic_shapes: DynamicShapes | Literal["batch"] = "batch",
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], Reduced]:
    """Run MagR on a copy of the weights, and return a state dict for `module.load_state_dict`; the module is not changed.

    Args:
        module: The module; it is run in evaluation mode.
        example_inputs: See `magr_onnx.torch.optimize`.
        calibration: Batches, see there.
        alpha: Strength; 1e-3 suits one scale per channel, 1e-4 one per block (see `magr_onnx.passes.MagR`).
        relative: Whether alpha is relative to the layer.
        block_size: Rows per l_inf norm; None for whole channels.
        damping: Multiple of the Gram matrix's mean diagonal; None to derive it from the number of rows.
        to_inputs: Extracts the inputs from a batch.
        samples: Most samples read from a loader; None for all.
        batch_size: Most samples per batch; None for a recipe's, or 16.
        dynamic_shapes: See `magr_onnx.integrations.torch.export`.
        **settings: ``include``, ``exclude``, ``mask``, ``provider`` and the like of `magr_onnx.optimize`.

    Returns:
        The state dict, with new tensors for changed parameters (shared by tied ones) and the module's own for others; and the result.

    Raises:
        ExportError: torch cannot export the module.
        ModelError: There is no layer to change.
        OptionError: An option or value is invalid; raised before the export.
        MagrError: Whatever `magr_onnx.optimize` raises.
    """
    return _magr(magr, with_keywords(locals(), "settings"))


def magr_(module: torch.nn.Module, example_inputs: Examples, calibration: Iterable[Any], **options: Any) -> Reduced:
    """Run `magr` and write the values back to the module's parameters, whose types, devices and ties stay.

    Args:
        module: The module; changed in place.
        example_inputs: See `magr`.
        calibration: See `magr`.
        **options: See `magr`.

    Raises:
        MagrError: See `magr`; the module is then unchanged.
    """
    state, reduced = _magr(magr_, with_keywords(locals(), "options"))
    parameters = module.state_dict()
    with torch.no_grad():
        for change in reduced.changed:
            parameters[change.name].copy_(state[change.name])
    return reduced


@translate_resource_errors()
def _magr(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Reduced]:
    """Run `magr` or `magr_` with ``arguments`` by name."""
    defaults = defaults_of(magr)
    values = {**defaults, **arguments}
    settings = {name: value for name, value in arguments.items() if name not in defaults}
    raise_all(OptionError, [f"magr has no option {n!r}{closest(n, [*defaults, *_SETTINGS])}" for n in settings if n not in _SETTINGS])
    strength = schema.word_to_none({name: values[name] for name in ("alpha", "block_size", "damping")})
    schema.check(**strength, samples=values["samples"])
    if strength["alpha"] is None:
        raise OptionError("alpha = None: MagR alone has no strength to choose from the error of codes; give one, such as 1e-3")
    pipeline = [MagR(relative=values["relative"], **strength)]
    exported = cache(partial(export, values["module"], values["example_inputs"], dynamic_shapes=values["dynamic_shapes"], fold=False))
    options = {**settings, "pipeline_text": pipeline, **{name: values[name] for name in ("calibration", "batch_size")}}
    result = run_exported(exported, values["to_inputs"], values["samples"], options, torch_call(function, arguments))
    before = files.load(exported().program).model
    inline_and_rename(before)
    canonicalize(before)
    return _written_back(values["module"], before, result)


def _written_back(module: torch.nn.Module, before: ir.Model, result: Optimized) -> tuple[dict[str, torch.Tensor], Reduced]:
    """The state dict of the module with the weights of the result, whose float model is ``before``, and what differs."""
    reduced = {layer.name: layer for layer in find(result.model)[0]}
    errors = {row.name: row.error for row in result.report.layers}
    layers, skips = find(before)
    reasons = {s.name: str(s.reason) for s in skips} | {s.name: s.reason for s in result.report.skipped}
    state = module.state_dict()
    changed: list[Change] = []
    unchanged: dict[str, str] = {}
    for names, parameter in _parameters(module):
        reason, new, readers = _new_value(names, parameter, before, layers, reduced, errors, reasons)
        if reason is not None:
            unchanged |= dict.fromkeys(names, reason)
            continue
        assert new is not None
        old, layer_names = _array(parameter), tuple(layer.name for layer in readers)
        largest = max((e for n in layer_names if (e := errors[n]) is not None), default=None)
        changed.append(Change(names[0], tuple(names[1:]), layer_names, float(np.abs(old).max()), float(np.abs(new).max()), largest))
        state |= dict.fromkeys(names, torch.from_numpy(new).to(device=parameter.device, dtype=parameter.dtype))
    if not changed:
        raise ModelError("MagR changed no parameter: " + "; ".join(f"{n}: {reason}" for n, reason in list(unchanged.items())[:5]))
    return state, Reduced(tuple(changed), unchanged, result.report)


def _parameters(module: torch.nn.Module) -> list[tuple[list[str], torch.nn.Parameter]]:
    """List floating-point parameters of two or more axes, each with all its names."""
    parameters: dict[int, tuple[list[str], torch.nn.Parameter]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameters.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(parameters.values())


def _array(parameter: torch.Tensor) -> Array:
    """Convert to NumPy, bfloat16 exactly to float32."""
    value = parameter.detach().cpu()
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def _new_value(
    names: Sequence[str],
    parameter: torch.Tensor,
    model: ir.Model,
    layers: Sequence[LinearLayer],
    reduced: Mapping[str, LinearLayer],
    errors: Mapping[str, float | None],
    reasons: Mapping[str, str],
) -> tuple[str | None, Array | None, list[LinearLayer]]:
    """Compute the new value of a parameter in float32, and the layers that read it; or the reason why it is not changed."""
    initializers = [v for n in names if (v := model.graph.initializers.get(n)) is not None]
    if not initializers:
        return "not in the exported model under its name", None, []
    old = _array(parameter)
    if any(v.const_value is None or not _same(v.const_value.numpy(), old) for v in initializers):
        return "its values are not those of the initializer of its name", None, []
    layer_of = {id(layer.node): layer for layer in layers}
    nodes = [node for value in initializers for node in _readers(value)]
    others = [n for n in nodes if n is None or id(n) not in layer_of]
    if others:
        return _reason(others, reasons), None, []
    readers = [layer_of[id(n)] for n in nodes if n is not None]
    if missing := [layer.name for layer in readers if layer.name not in errors or layer.name not in reduced]:
        return "; ".join(f"{n}: {reasons.get(n, 'not converted')}" for n in missing), None, []
    candidates = []
    for layer in readers:
        to_parameter = _layout(old, layer)
        if to_parameter is None:
            return f"{layer.name} multiplies by another value computed from it", None, []
        candidates.append(to_parameter(reduced[layer.name].read()))
    if not all(_same(candidates[0], other) for other in candidates[1:]):
        return f"{', '.join(layer.name for layer in readers)} gave different values for it", None, []
    return None, np.ascontiguousarray(candidates[0]), readers


def _layout(old: Array, layer: LinearLayer) -> Callable[[Array], Array] | None:
    """Return the map from a layer's weight to the parameter; None if it is neither the parameter nor its transpose."""
    weight = layer.read()
    if old.ndim != 2:
        return None
    if layer.transposed and _same(old.T.astype(np.float32), weight):
        return np.transpose
    if _same(old.astype(np.float32), weight):
        return lambda w: w
    return np.transpose if _same(old.T.astype(np.float32), weight) else None


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """Yield the nodes that compute with a constant, behind those that change its layout; None for a model output."""
    if value.is_graph_output():
        yield None
    for node, _ in value.uses():
        if node.domain == "" and node.op_type in _LAYOUT_OPS:
            yield from _readers(node.outputs[0])
        else:
            yield node


def _reason(others: Sequence[ir.Node | None], reasons: Mapping[str, str]) -> str:
    node = others[0]
    if node is None:
        return "it is an output of the model"
    if node.op_type in ("Conv", "ConvTranspose"):
        return "a convolution: MagR alone is for linear layers"
    reason = None if node.op_type == "Gather" else reasons.get(str(node.name))  # tables cannot be converted here
    return f"{node.op_type} {node.name} reads it" + (f" ({reason})" if reason else ", and would change with it")
