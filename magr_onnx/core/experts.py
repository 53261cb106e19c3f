"""Mixtures of experts as com.microsoft MoE computes them on CPUs: which tokens an expert sees, and what is between its layers.

A token goes to the ``k`` experts with the highest scores. Their outputs are weighted by the softmax of all scores, or of those k alone
(``normalize_routing_weights``), which changes nothing about who sees a token. Measured with onnxruntime 1.32: ``gelu`` is approximated by a
tanh, and the gates of ``swiglu`` are the even units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array

GATED = "swiglu"


@dataclass(frozen=True, slots=True)
class Form:
    """What experts compute besides their products.

    Attributes:
        k: Experts that a token goes to.
        activation: A name in `ACTIVATIONS`.
        alpha: Factor of the gate in its sigmoid (swiglu).
        beta: Added to the gated units (swiglu).
        limit: Most that a gate and the magnitude of a unit can be (swiglu); None for any.
    """

    k: int
    activation: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def gated(self) -> bool:
        """Whether the first layer has a gate beside every unit."""
        return self.activation == GATED

    def between(self, values: Array) -> Array:
        """Compute the inputs ``(n, I)`` of the second layer from the outputs ``(n, F)`` of the first."""
        return ACTIVATIONS[self.activation](values, self)


def route(scores: Array, k: int) -> npt.NDArray[np.bool_]:
    """Return which experts see which tokens, ``(n, E)``, by their scores ``(n, E)``: the k highest, the first of equal ones."""
    seen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(seen, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    return seen


def nearest(scores: Array, k: int, expert: int, among: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """Return up to ``count`` tokens of those ``among (n,)`` that lack the least of a score to go to an expert, ``(n,)``."""
    found = np.zeros(len(scores), np.bool_)
    candidates = np.flatnonzero(among)
    lacking = np.sort(scores[candidates], axis=1)[:, -k] - scores[candidates, expert]
    found[candidates[np.argsort(lacking, kind="stable")[: max(count, 0)]]] = True
    return found


def _sigmoid(x: Array) -> Array:
    result: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return result


def _gelu(x: Array, _: Form) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3)))
    return result


def _swiglu(x: Array, form: Form) -> Array:
    gate, unit = x[:, ::2], x[:, 1::2]
    if form.limit is not None:
        gate, unit = np.minimum(gate, form.limit), np.clip(unit, -form.limit, form.limit)
    result: Array = gate * _sigmoid(form.alpha * gate) * (unit + form.beta)
    return result


ACTIVATIONS: dict[str, Callable[[Array, Form], Array]] = {
    "relu": lambda x, _: np.maximum(x, 0),
    "gelu": _gelu,
    "silu": lambda x, _: x * _sigmoid(x),
    "identity": lambda x, _: x,
    GATED: _swiglu,
}
"""Functions between the layers of an expert, by the name they have in MoE."""
