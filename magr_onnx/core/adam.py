"""Adam (Kingma and Ba, arXiv 1412.6980): descent along gradients, each divided by the root of its mean square."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from magr_onnx.core.types import Array

BETAS = (0.9, 0.95)
EPSILON = 1e-12  # of gradients of losses of any size


class Adam:
    """Parameters on their way.

    Attributes:
        parameters: Their values now, by name.
    """

    def __init__(self, parameters: Mapping[str, Array]) -> None:
        """Begin with copies of ``parameters``."""
        self.parameters = {name: np.array(value, np.float32) for name, value in parameters.items()}
        self._first = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        self._second = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        self._steps = 0

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """Move every parameter that has a gradient by about the rate."""
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in BETAS]
        for name, gradient in gradients.items():
            first, second = self._first[name], self._second[name]
            first += (1 - BETAS[0]) * (gradient - first)
            second += (1 - BETAS[1]) * (np.square(gradient) - second)
            self.parameters[name] -= rate * (first / corrections[0]) / (np.sqrt(second / corrections[1]) + EPSILON)
