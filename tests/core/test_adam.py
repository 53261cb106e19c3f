"""Adam against the sums that its moving averages stand for."""

from __future__ import annotations

import numpy as np

from magr_onnx.core.adam import Adam


def test_steps_are_means_over_root_mean_squares_of_all_gradients_so_far() -> None:
    rng = np.random.default_rng(0)
    expected, rates = rng.standard_normal((3, 5)), (0.1, 0.05, 0.02, 0.0, 0.3)
    gradients = [rng.standard_normal((3, 5)) * 10.0 ** rng.integers(-3, 3, (3, 5)) for _ in rates]
    adam = Adam(expected, 0.95)
    for step, rate in enumerate(rates):
        adam.step(gradients[step].astype(np.float32), rate)
        mean, square = (
            sum(beta ** (step - i) * gradients[i] ** power for i in range(step + 1)) / sum(beta**i for i in range(step + 1))
            for power, beta in ((1, 0.9), (2, 0.95))
        )
        expected = expected - rate * mean / np.sqrt(square)
        np.testing.assert_allclose(adam.values, expected, rtol=1e-4, atol=1e-5)


def test_a_first_step_is_as_long_as_the_rate_whatever_the_gradient() -> None:
    start = np.zeros(3, np.float32)
    adam = Adam(start)
    adam.step(np.array([1e-6, -5.0, 3e4], np.float32), 0.25)
    np.testing.assert_allclose(adam.values, [-0.25, 0.25, -0.25], rtol=1e-4)
    np.testing.assert_array_equal(start, 0.0)  # it is a copy that moves
