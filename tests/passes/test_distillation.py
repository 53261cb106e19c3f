"""The loss against another model's outputs, and its gradients, against formulas and finite differences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.passes.instrument.distillation import distillation_taps
from magr_onnx.passes.instrument.gradients import shaped_values
from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.runtime.measure.validate import is_logits, log_softmax
from magr_onnx.runtime.ort.session import Session
from tests.graphs import FLOAT, Array, Builder, random


def two_layers(output: str) -> ir.Model:
    """``tanh(x W1 * r) W2``, with r a graph input."""
    b = Builder()
    x, r = b.input("x", ["batch", "time", 8]), b.input("r", [6])
    hidden = b.node("Tanh", [b.node("Mul", [b.node("MatMul", [x, b.constant("w1", random(8, 6, scale=1.0))]), r])])
    return b.model(b.node("MatMul", [hidden, b.constant("w2", random(6, 5, seed=1, scale=1.0))]), ["batch", "time", 5], output)


def feeds(seed: int = 0) -> dict[str, Array]:
    return {"x": random(2, 3, 8, seed=seed, scale=1.0), "r": random(6, seed=9, scale=1.0) + 1}


def loss_of(output: str, y: Array, goal: Array, weights: Array) -> float:
    y, goal = y.astype(np.float64), goal.astype(np.float64)
    if output == "y":
        return float((np.square(y - goal) * weights).sum())
    p, q = log_softmax(goal), log_softmax(y)
    return float((np.exp(p) * (p - q) * weights).sum())


@pytest.mark.parametrize("output", ["logits", "y"])
def test_loss_and_gradient(output: str) -> None:
    model, batch = two_layers(output), feeds()
    names = shaped_values(model)
    with Session(shape_taps(model, names)) as session:
        shapes = {name: tuple(map(int, shape)) for name, shape in zip(names, session.run(batch), strict=True)}
    taps = distillation_taps(model, ["r"], shapes, is_logits)
    goal, weights = random(2, 3, 5, seed=4, scale=1.0), np.abs(random(2, 3, 1, seed=5, scale=1.0))
    weights[1, 2] = 0
    assert list(taps.targets) == [output]
    assert (taps.reached, taps.blocked) == (["r"], set())
    target = taps.targets[output]
    p = np.exp(log_softmax(goal))
    more = {target.weights: weights, target.goal: p if output == "logits" else goal}
    if output == "logits":
        more[target.entropy] = -(p * np.log(p)).sum(axis=-1, keepdims=True)
    with Session(taps.model) as session, Session(model) as plain:
        loss, gradient = session.run({**batch, **more})
        assert float(loss) == pytest.approx(loss_of(output, plain.run(batch)[0], goal, weights), rel=1e-5)
        step = 1e-2
        for i in range(6):
            values = []
            for sign in (1, -1):
                r = batch["r"].copy()
                r[i] += sign * step
                values.append(loss_of(output, plain.run({**batch, "r": r})[0], goal, weights))
            assert gradient[i] == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-3)
        more[target.goal][1, 2] += 100  # a row that does not count
        assert session.run({**batch, **more})[0] == loss


def test_layers_before_what_has_no_derivative_are_not_reached() -> None:
    b = Builder()
    x, r = b.input("x", ["batch", 8]), b.input("r", [8])
    cut = b.node("CumSum", [b.node("Mul", [x, r]), b.constant("axis", np.array(1))])
    model = b.model(b.node("Relu", [cut]), ["batch", 8])
    names = shaped_values(model)
    batch = {"x": random(4, 8), "r": np.ones(8, np.float32)}
    with Session(shape_taps(model, names)) as session:
        shapes = {name: tuple(map(int, shape)) for name, shape in zip(names, session.run(batch), strict=True)}
    taps = distillation_taps(model, ["r"], shapes, is_logits)
    assert (taps.reached, taps.blocked) == ([], {"CumSum"})
    assert FLOAT in {v.dtype for v in taps.model.graph.inputs}
