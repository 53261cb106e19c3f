"""KV caches of decoders: the inputs with past keys and values, and the outputs that update them.

They are recognized by names that exporters share: ``past_key_values.0.key`` with ``present.0.key`` (optimum, onnxruntime-genai),
``past_key_0`` with ``present_key_0``, ``past_0`` with ``present_0``, ``past_conv.0`` with ``present_conv.0``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

TOKENS = "input_ids"
DEFAULT_MASK = "attention_mask"
PREFIX = "past"
PREFIXES = ("past_key_values", "past")


def pairs(inputs: Iterable[str], outputs: Collection[str]) -> dict[str, str]:
    """Map every cache input to the output with its next value, by name; empty for a model without a cache."""
    caches = {}
    for name in inputs:
        names = (f"present{name.removeprefix(p)}" for p in PREFIXES if name.startswith(p))
        output = next((n for n in names if n in outputs), None)
        if output is not None:
            caches[name] = output
    return caches


def pairs_of(model: ir.Model) -> dict[str, str]:
    """Return `pairs` of the inputs and outputs of a model."""
    return pairs((str(v.name) for v in model.graph.inputs), {str(v.name) for v in model.graph.outputs})


def current_mask(batch: Mapping[str, npt.NDArray[np.generic]], mask: str) -> npt.NDArray[np.bool_]:
    """Return the mask of the current tokens: a decoder's mask covers past and current tokens, the current ones last.

    Args:
        batch: The inputs of the model.
        mask: Name of the mask input.

    Returns:
        Booleans ``(B, T)``, in the shape of the tokens for a decoder with cache inputs, else in that of the mask.
    """
    truth: npt.NDArray[np.bool_] = np.asarray(batch[mask]) != 0
    shape = current_shape({name: np.shape(array) for name, array in batch.items()}, mask)
    return truth if truth.shape == shape else truth[:, -shape[1] :]


def current_shape(shapes: Mapping[str, tuple[int, ...]], mask: str) -> tuple[int, ...]:
    """Return the shape of `current_mask`, given the shapes of the inputs of the model by name."""
    shape = shapes[mask]
    if len(shape) != 2 or TOKENS not in shapes or not any(name.startswith(PREFIX) for name in shapes):
        return shape
    return shape[0], min(shape[1], shapes[TOKENS][-1])
