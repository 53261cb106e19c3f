"""Models that put out infinities of their own: scores of actions, tokens or pairs that a mask leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Array, Builder, random

K, N, SAMPLES = 48, 40, 64
MASK = np.where(np.arange(N) % 5 == 0, -np.inf, 0).astype(np.float32)


def scores(name: str) -> ir.Model:
    b = Builder()
    x = b.node("Tanh", [b.node("MatMul", [b.input("x", ["batch", K]), b.constant("body", random(K, K))], "body_product")])
    product = b.node("MatMul", [x, b.constant("head", random(K, N, seed=1))], "head_product")
    return b.model(b.node("Add", [product, b.constant("mask", MASK)], "masked"), ["batch", N], name)


def run(model: Any, x: Array) -> Array:
    with Session(model) as session:
        return np.asarray(session.run({"x": x})[0], np.float64)


@pytest.mark.parametrize("name", ["logits", "y"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2},
        {"bits": 3, "block_size": None},
        {"effort": "best"},
        {"format": "qdq-int8"},
        {"target_size": "45%"},
        {"max_loss": "1%"},
    ],
    ids=str,
)
def test_they_stay_and_the_others_are_compared(name: str, options: dict[str, Any]) -> None:
    """Losses were NaN, so that budgets failed, and choices between two models were those of chance; the mask was taken for a bias."""
    x = np.random.default_rng(0).standard_normal((2, SAMPLES, K)).astype(np.float32)
    made, report = magr_onnx.optimize(scores(name), {"x": x[0]}, **options)
    expected, found = run(scores(name), x[1]), run(made, x[1])
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    kept = np.isfinite(expected)
    assert np.linalg.norm(found[kept] - expected[kept]) < (0.6 if options.get("bits") == 2 else 0.4) * np.linalg.norm(expected[kept])
    assert report.check is not None
    if report.assignment is not None:
        assert 0 < report.assignment.attempts[-1].predicted < 1
