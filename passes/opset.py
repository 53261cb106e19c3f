"""Raising the opset of a model, only as far as an operator needs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import onnx_ir as ir
from onnxscript import version_converter

from magr_onnx.errors import ModelError

IR_VERSIONS = {13: 7, 16: 8, 19: 9, 21: 10}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's warning that it falls back on the converter of onnx, which is as good."""
    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def raise_opset(model: ir.Model, target: int, why: str = "an operator it needs") -> bool:
    """Convert the model to at least opset ``target`` and its IR version; True if anything changed.

    Args:
        model: Changed in place.
        target: The opset; 0 for no demand.
        why: What needs it, for the message.

    Raises:
        ModelError: The converter cannot bring the model there.
    """
    changed = False
    if model.opset_imports.get("", 0) < target:
        before = model.opset_imports.get("", 0)
        try:
            with _quiet():
                version_converter.convert_version(model, target, fallback=True)
        except Exception as error:
            raise ModelError(f"the model (opset {before}) cannot be converted to opset {target}: {error}") from error
        if model.opset_imports.get("", 0) < target:
            raise ModelError(
                f"the model has opset {before} and could not be converted to opset {target}, which {why} needs; export it with a newer "
                "opset, or use format matmulnbits"
            )
        changed = True
    if model.ir_version < IR_VERSIONS.get(target, 0):
        model.ir_version = IR_VERSIONS[target]
        changed = True
    return changed
