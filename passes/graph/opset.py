"""Conversion of a model to the least opset that an operator needs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import onnx_ir as ir
from onnxscript import version_converter

from magr_onnx.errors import ModelError
from magr_onnx.model_io import contrib_schemas
from magr_onnx.model_io.external_data import model_values
from magr_onnx.model_io.validate_proto import SCAN_OF_BATCHES
from magr_onnx.passes.graph import metadata
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import operator_of
from magr_onnx.passes.graph.subgraphs import unique_names

TRADITIONAL, ASIDE = "ai.onnx.ml", "onnx_magr.aside"

IR_VERSIONS = {13: 7, 16: 8, 19: 9, 21: 10}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that the converter falls back to onnx's, and what that one prints."""
    logger = logging.getLogger("onnxscript.version_converter")
    level, stderr = logger.level, os.dup(2)
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        logger.setLevel(level)


@contextlib.contextmanager
def _set_aside(model: ir.Model) -> Iterator[None]:
    """Give traditional operators a domain that converters do not know, while they work: onnx-ir cannot read the maps inferred of them."""
    _rename_domain(model, TRADITIONAL, ASIDE)
    try:
        yield
    finally:
        _rename_domain(model, ASIDE, TRADITIONAL)


def _rename_domain(model: ir.Model, old: str, new: str) -> None:
    for node in model.graph.all_nodes():
        if node.domain == old:
            node.domain = new
            model.opset_imports[new] = model.opset_imports[old]
    if old == ASIDE:
        model.opset_imports.pop(old, None)


def raise_opset(model: ir.Model, target: int, why: str = "an operator it needs") -> bool:
    """Convert the model to at least opset ``target`` and its IR version; True if anything changed.

    Args:
        model: Changed in place.
        target: The opset; 0 for no minimum.
        why: What needs the opset, for the message.

    Raises:
        ModelError: The model cannot be converted.
    """
    changed = False
    if model.opset_imports.get("", 0) < target:
        before = model.opset_imports.get("", 0)
        if before == SCAN_OF_BATCHES and any(operator_of(node) == "Scan" for node in model.graph.all_nodes()):
            raise ModelError(
                f"the model has opset {before}, whose Scan runs over a batch of sequences, and cannot be converted to opset {target}, "
                f"which {why} needs; export it with a newer opset, or use format matmulnbits"
            )
        labels, folders = metadata.collect(model), {_place(tensor): tensor.base_dir for tensor in _external(model)}
        declared = [(value.type, value.shape) for value in model.graph.outputs]
        typed = {value.name for value in _computed(model) if value.type is not None or value.shape is not None}
        contrib_schemas.register()
        try:
            with _quiet(), _set_aside(model):
                version_converter.convert_version(model, target, fallback=True)
        except Exception as error:
            raise ModelError(f"the model (opset {before}) cannot be converted to opset {target}: {error}") from error
        if model.opset_imports.get("", 0) < target:
            raise ModelError(
                f"the model has opset {before} and could not be converted to opset {target}, which {why} needs; export it with a newer "
                "opset, or use format matmulnbits"
            )
        metadata.restore(model, labels)
        for tensor in _external(model):
            tensor.base_dir = tensor.base_dir or folders[_place(tensor)]
        for value in _computed(model):
            if value.name not in typed:
                value.type = value.shape = None  # inferred by the converter; with long names as large as the weights of a small model
        for value, (kind, shape) in zip(model.graph.outputs, declared, strict=True):
            value.type, value.shape = kind, shape
        _distinct_names(model)
        changed = True
    if model.ir_version < IR_VERSIONS.get(target, 0):
        model.ir_version = IR_VERSIONS[target]
        changed = True
    return changed


def raise_opset_if_possible(model: ir.Model, target: int) -> bool:
    """Convert the model to at least opset ``target`` and its IR version, or leave it where that cannot be; True if anything changed."""
    if model.opset_imports.get("", 0) < target:
        try:
            raise_opset(model.clone(), target)
        except ModelError:
            return False
    return raise_opset(model, target)


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return the initializers in files; onnx's own converter forgets the folders of those in bodies."""
    return [value.const_value for value in model_values(model) if isinstance(value.const_value, ir.ExternalTensor)]


def _place(tensor: ir.ExternalTensor) -> tuple[str, str, int | None]:
    return str(tensor.name), str(tensor.location), tensor.offset


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    return (value for node in model.graph.all_nodes() for value in node.outputs)


def _distinct_names(model: ir.Model) -> None:
    """Make names unique: converters add nodes named like the Softmax they surround, and values named as in another graph."""
    names = Names()
    for node in model.graph.all_nodes():
        if node.name:
            node.name = names.node(node.name)
    unique_names(model)
    Names.rescan(model.graph)
