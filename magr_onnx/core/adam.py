"""Adam (Kingma and Ba, arXiv 1412.6980): descent along gradients, each divided by the root of its mean square."""

from __future__ import annotations

import numpy as np

from magr_onnx.core.types import Array

EPSILON = 1e-12  # of gradients of losses of any size


class Adam:
    """One array on its way.

    Attributes:
        values: It now.
    """

    def __init__(self, values: Array, second: float = 0.999) -> None:
        """Begin with a copy of ``values``; ``second`` is the decay of the mean square, that of the mean is 0.9."""
        self.values = np.array(values, np.float32)
        self._means, self._squares = np.zeros_like(self.values), np.zeros_like(self.values)
        self._decays, self._steps = (0.9, second), 0

    def step(self, gradient: Array, rate: float) -> None:
        """Move by about the rate against a gradient of the shape of ``values``."""
        self._steps += 1
        first, second = self._decays
        self._means += (1 - first) * (gradient - self._means)
        self._squares += (1 - second) * (np.square(gradient) - self._squares)
        size = np.sqrt(self._squares / (1 - second**self._steps))
        size += np.float32(EPSILON)
        self.values -= np.float32(rate / (1 - first**self._steps)) * self._means / size
