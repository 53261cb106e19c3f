"""Decoders with a cache of keys and values: which inputs hold the past, which outputs what is past in the next step.

Only names tell, and exporters use the same ones: ``past_key_values.0.key`` with ``present.0.key`` (optimum, onnxruntime-genai's builder),
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
    """Inputs that hold the past, each with the output that is its next value, by name; a model without a cache has none."""
    found = {}
    for name in inputs:
        names = (f"present{name.removeprefix(p)}" for p in PREFIXES if name.startswith(p))
        twin = next((n for n in names if n in outputs), None)
        if twin is not None:
            found[name] = twin
    return found


def pairs_of(model: ir.Model) -> dict[str, str]:
    """`pairs` of the inputs and outputs of a model."""
    return pairs((str(v.name) for v in model.graph.inputs), {str(v.name) for v in model.graph.outputs})


def current_mask(batch: Mapping[str, npt.NDArray[np.generic]], mask: str) -> npt.NDArray[np.bool_]:
    """Which of the tokens fed now count: a decoder's mask is as long as the past and the current tokens together, the current ones last.

    Args:
        batch: What the model is fed.
        mask: The name of the mask among it.

    Returns:
        Booleans ``(B, T)``, in the shape of the tokens for a decoder that is fed a past, else in that of the mask.
    """
    truth: npt.NDArray[np.bool_] = np.asarray(batch[mask]) != 0
    if TOKENS not in batch or not any(name.startswith(PREFIX) for name in batch):
        return truth
    columns = np.shape(batch[TOKENS])[-1]
    return truth[:, -columns:] if truth.ndim == 2 and truth.shape[1] > columns else truth
