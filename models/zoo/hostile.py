"""Old files, and files that ask for more than they hold."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from magr_onnx.models.zoo.trap import CONVERTED, Trap, constant, model

W, B = constant("w", 48, 24), constant("b", 24)
HUGE = np.array([1 << 40, 16])


def _inputs() -> onnx.ModelProto:
    """As files before IR version 4 had to be: every initializer is an input too."""
    proto = model("g (float[n, 48] x) => (float[n, 24] y) { [fc] y = Gemm(x, w, b) }", opset=9, ir_version=3, w=W, b=B)
    proto.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer)
    return proto


TRAPS = (
    Trap(
        "constants-among-the-inputs",
        _inputs,
        lambda rng: {"x": rng.standard_normal((6, 48), np.float32)},
        lambda feeds, weights: [feeds["x"] @ weights["fc"] + B],
        {"fc": CONVERTED},
    ),
    Trap(
        "opset-7",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 1, 24] y) {
                [fc] h = Gemm(x, w, b)
                u = Unsqueeze<axes = [1]>(h)
                y = Clip<min = -1.0, max = 1.0>(u)
            }""",
            opset=7,
            w=W,
            b=B,
        ),
        lambda rng: {"x": rng.standard_normal((6, 48), np.float32)},
        lambda feeds, weights: [np.clip(feeds["x"] @ weights["fc"] + B, -1, 1)[:, None]],
        {"fc": CONVERTED},
    ),
    Trap(
        "layer-nobody-reads",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 24] y) {
                [fc] y = MatMul(x, w)
                [unread] z = MatMul(x, v)
                r = Relu(z)
            }""",
            w=W,
            v=W,
        ),
        lambda rng: {"x": rng.standard_normal((6, 48), np.float32)},
        lambda feeds, weights: [feeds["x"] @ weights["fc"]],
        {"fc": CONVERTED},
    ),
    Trap(
        "half-precision-in-a-branch",
        lambda: model(
            """g (float16[n, 48] x, bool c) => (float16[n, 24] y) {
                y = If(c) <
                    then_branch = t () => (float16[n, 24] ty) { [one] ty = MatMul(x, w) },
                    else_branch = e () => (float16[n, 24] ey) { [other] ey = MatMul(x, v) }
                >
            }""",
            opset=21,
            ir_version=10,
            w=W.astype(np.float16),
            v=-W.astype(np.float16),
        ),
        lambda rng: {"x": rng.standard_normal((6, 48)).astype(np.float16), "c": np.array(True)},
        lambda feeds, weights: [(feeds["x"].astype(np.float32) @ weights["one"]).astype(np.float16)],
        {"one": CONVERTED, "other": CONVERTED},
    ),
    Trap(
        "constant-of-terabytes",
        lambda: model("g (float[n, 48] x) => (float[n, 24] y) { [fc] y = MatMul(x, w) z = ConstantOfShape(s) }", w=W, s=HUGE),
        lambda rng: {},
        lambda feeds, weights: [],
        {},
        refused="bytes of constants",
    ),
    Trap(
        "convolution-of-no-groups",
        lambda: model(
            "g (float[n, 48] x, float[n, 8, 9] i) => (float[n, 24] y) { [fc] y = MatMul(x, w) c = Conv<group = 0>(i, k) }",
            w=W,
            k=constant("k", 8, 8, 3),
        ),
        lambda rng: {},
        lambda feeds, weights: [],
        {},
        refused="counts from 1",
    ),
    Trap(
        "operator-of-nobody",
        lambda: model("g (float[n, 48] x) => (float[n, 24] y) { [fc] h = MatMul(x, w) y = their.ops.Odd(h) }", domains=("their.ops",), w=W),
        lambda rng: {},
        lambda feeds, weights: [],
        {},
        refused="custom operators, which this onnxruntime lacks: their.ops::Odd",
    ),
)
