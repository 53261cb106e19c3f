"""Output-adaptive Hessians: inputs weigh as much as errors on them change the outputs of the model.

With ``G_s = X_s^T Delta_s (K, N)`` the gradient of the loss of one sample by the weight (``X_s (T, K)`` the layer's input in the sample,
``Delta_s (T, N)`` the gradients at its output), the Fisher information of a column of the weight, averaged over columns, is

    H = 1/(S N) sum_s G_s G_s^T,

which takes the place of ``X^T X / n`` in the solvers (OAC; Edalati et al., arXiv 2405.15025). A bias that absorbs the mean error turns
``X_s`` into ``X_s - 1 mu^T``. With ones as a further input, ``X'_s = [X_s 1]``, the matrix ``H' (K+1, K+1)`` has all this needs:

    H_centred = P^T H' P,      P = [I, -mu]^T.

Deviations from the paper: the gradients are random ones with the Fisher information of the model's outputs
(`magr_onnx.passes.instrument.gradients.fisher_gradients`), not those of the data's next tokens; they exist for any model, and their H is
that of the divergence from the float model. From few samples H is noisy and of low rank: it is mixed with the Gram matrix, at equal traces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magr_onnx.core.gram import dense, gram_type
from magr_onnx.core.types import Array, LayerStats


@dataclass(frozen=True, slots=True, eq=False)
class AdaptiveHessian:
    """The output-adaptive Hessian of one layer.

    Attributes:
        moments: ``H' (K+1, K+1)``, up to a factor.
        share: Its share of the matrix that weights are solved with, 0 to 1; the rest is the Gram matrix.
    """

    moments: Array
    share: float

    def matrix(self, mean: Array, centred: bool) -> Array:
        """Return ``H (K, K)`` float64, or ``H_centred`` for the mean input ``mean (K,)``."""
        h: Array = self.moments[:-1, :-1].astype(np.float64)
        if centred:
            with_ones = self.moments[:-1, -1].astype(np.float64)
            outer = np.outer(with_ones - 0.5 * float(self.moments[-1, -1]) * mean, mean)
            h -= outer + outer.T
        return h

    def diagonal(self, centred: bool) -> Array:
        """Return the diagonal of H ``(K,)`` float64.

        Where ``centred``, a bias takes up what inputs have in common, and is the best one by these gradients.
        """
        squares = self.moments.diagonal().astype(np.float64)
        if not centred or squares[-1] <= 0:
            return squares[:-1]
        result: Array = np.maximum(squares[:-1] - np.square(self.moments[:-1, -1], dtype=np.float64) / squares[-1], 0)
        return result

    def mixed(self, stats: LayerStats, centred: bool) -> LayerStats:
        """Return statistics whose Gram matrix is the mix, and that need no centring any more; without folds.

        Args:
            stats: Statistics of the layer's input.
            centred: Whether a bias absorbs the mean error.
        """
        gram = dense(stats.objective_gram(centred)).astype(np.float64)
        h = self.matrix(stats.mean, centred)
        unused = np.flatnonzero(gram.diagonal() <= 0)  # what is left of them in H is rounding
        h[unused] = h[:, unused] = 0
        trace = float(h.trace())
        if trace > 0:
            gram = (1 - self.share) * gram + self.share * float(gram.trace()) / trace * h
        mean = np.zeros(len(gram))
        return LayerStats(gram.astype(gram_type(len(gram))), mean, stats.rows, activation=stats.activation, backend=stats.backend)
