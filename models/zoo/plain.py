"""The forms every export has."""

from __future__ import annotations

import numpy as np

from magr_onnx.models.zoo.trap import CONVERTED, Trap, constant, model

W, B, SMALL = constant("w", 48, 24), constant("b", 24), constant("small", 24, 1)

TRAPS = (
    Trap(
        "matmul-and-bias",
        lambda: model(
            """g (float[n, t, 48] x) => (float[n, t, 24] y) {
                [fc] h = MatMul(x, w)
                y = Add(h, b)
            }""",
            w=W,
            b=B,
        ),
        lambda rng: {"x": rng.standard_normal((3, 5, 48), np.float32)},
        lambda feeds, weights: [feeds["x"] @ weights["fc"] + B],
        {"fc": CONVERTED},
    ),
    Trap(
        "gemm-alpha-beta-transb",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 24] y) {
                [fc] y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)
            }""",
            w=np.ascontiguousarray(W.T),
            b=B,
        ),
        lambda rng: {"x": rng.standard_normal((7, 48), np.float32)},
        lambda feeds, weights: [feeds["x"] @ weights["fc"] + 2 * B],
        {"fc": CONVERTED},
    ),
    Trap(
        "one-output-channel",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 1] y) {
                [first] h = MatMul(x, w)
                r = Relu(h)
                [last] y = MatMul(r, v)
            }""",
            w=W,
            v=SMALL,
        ),
        lambda rng: {"x": rng.standard_normal((6, 48), np.float32)},
        lambda feeds, weights: [np.maximum(feeds["x"] @ weights["first"], 0) @ weights["last"]],
        {"first": CONVERTED, "last": CONVERTED},
        {"include": ["*"]},
    ),
)
