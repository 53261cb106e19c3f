"""Convolutions and tables of embeddings in the bodies of If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from magr_onnx.models.zoo.convolutions import convolve, kernel, one, spread
from magr_onnx.models.zoo.embeddings import TABLE, UNASKED
from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Tensors, Trap, constant, model

K = kernel(8, 8, 3)
OTHER = np.ascontiguousarray(K[:, ::-1])
BIAS = constant("branch_b", 8)
SHOWN = ", ".join(f"{v:.9g}" for v in K.reshape(-1))

EITHER = """g (float[n, 8, 16] x, bool c) => (float[n, 8, 16] y) {
    h = If(c) <
        then_branch = yes () => (float[n, 8, 16] a) { r = Relu(x)  [c] a = Conv<pads = [1, 1]>(r, k, b) },
        else_branch = no () => (float[n, 8, 16] d) { t = Tanh(x)  [c] d = Conv<pads = [1, 1]>(t, v) }
    >
    y = Tanh(h)
}"""

HELD = """g (float[n, 8, 16] x, bool c) => (float[n, 8, 16] y) {
    y = If(c) <
        then_branch = yes () => (float[n, 8, 16] a) <float[8, 8, 3] inner = {VALUES}> { [c] a = Conv<pads = [1, 1]>(x, inner, b) },
        else_branch = no () => (float[n, 8, 16] d) {
            held = Constant<value = float[8, 8, 3] {VALUES}>()
            bias = Constant<value_floats = [1.0, 2.0, 0.0, 0.5, 0.0, 0.0, 3.0, 4.0]>()
            [other] d = Conv<pads = [1, 1]>(x, held, bias)
        }
    >
}""".replace("VALUES", SHOWN)

SHARED = """g (float[n, 8, 16] x, bool c) => (float[n, 8, 16] y) {
    h = If(c) <
        then_branch = yes () => (float[n, 8, 16] a) { [first] a = Conv<pads = [1, 1]>(x, k, b) },
        else_branch = no () => (float[n, 8, 16] d) { t = Tanh(x)  [second] d = Conv<pads = [2, 2], dilations = [2]>(t, k) }
    >
    r = Relu(h)
    [third] y = Conv<pads = [1, 1]>(r, k)
}"""

LOOPED = """g (float[4, 8, 16] x) => (float[4, 8, 1] y, float[4, 8, 1] z) {
    trips = Constant<value = int64 {3}>()
    go = Constant<value = bool {1}>()
    one = Constant<value = int64[1] {1}>()
    ten = Constant<value = int64[1] {10}>()
    axis = Constant<value = int64[1] {2}>()
    y, all = Loop(trips, go, start) <body = turn (int64 i, bool c, float[4, 8, 1] state) =>
        (bool next, float[4, 8, 1] out, float[4, 8] seen) {
            next = Identity(c)
            turns = Reshape(i, one)
            end = Add(turns, ten)
            part = Slice(x, turns, end, axis)
            twice = Mul(turns, axis)
            less = Slice(part, twice, ten, axis)
            [step] f = Conv(less, k, b)
            mean = ReduceMean<axes = [2]>(f)
            sum = Add(state, mean)
            out = Tanh(sum)
            seen = Squeeze(out, axis)
        }>
    turned = Transpose<perm = [1, 2, 0]>(all)
    [after] z = Conv(turned, v)
}"""

SCANNED = """g (float[t, 2, 4, 3, 3] x) => (float[2, 8, 1, 1] y, float[t, 2, 8, 1, 1] all) {
    y, all = Scan(start, x) <num_scan_inputs = 1, body = turn (float[2, 8, 1, 1] state, float[2, 4, 3, 3] now) =>
        (float[2, 8, 1, 1] out, float[2, 8, 1, 1] seen) {
            zero = Constant<value = float {0}>()
            sum = ReduceSum<keepdims = 0>(now)
            c = Greater(sum, zero)
            p = If(c) <
                then_branch = yes () => (float[2, 8, 1, 1] a) {
                    [up] u = ConvTranspose<strides = [2, 2], group = 2>(now, up, b)
                    a = ReduceMean<axes = [2, 3]>(u)
                },
                else_branch = no () => (float[2, 8, 1, 1] d) { [flat] f = Conv<group = 2>(now, flat)  d = ReduceMean<axes = [2, 3]>(f) }
            >
            s = Add(state, p)
            out = Tanh(s)
            seen = Identity(out)
        }>
}"""

LOOKED_UP = """g (int64[n] i, bool c) => (float[n, 64] y) {
    [main] p = Gather(table, i)
    q = If(c) <
        then_branch = yes () => (float[n, 64] a) { j = Neg(i)  [emb] a = Gather(table, j) },
        else_branch = no () => (float[n, 64] d) {
            [emb] g = Gather(table, i)
            e = Gather(second, i)
            d = Add(g, e)
        }
    >
    y = Add(p, q)
}"""


def _images(*shape: int, conditional: bool = True) -> Callable[[np.random.Generator], dict[str, Tensor]]:
    """Feeds, with a condition that is as often true as not."""

    def feeds(rng: np.random.Generator) -> dict[str, Tensor]:
        x = rng.standard_normal(shape, np.float32) + np.float32(0.2)
        return {"x": x, "c": np.array(rng.random() < 0.5)} if conditional else {"x": x}

    return feeds


def _either(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    x = feeds["x"]
    if feeds["c"]:
        return [np.tanh(convolve(np.maximum(x, 0), one(weights["c"]), BIAS, 1, 1, (1, 1)))]
    return [np.tanh(convolve(np.tanh(x), one(weights["c_1"]), None, 1, 1, (1, 1)))]


def _held(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    if feeds["c"]:
        return [convolve(feeds["x"], one(weights["c"]), BIAS, 1, 1, (1, 1))]
    return [convolve(feeds["x"], one(weights["other"]), np.array([1, 2, 0, 0.5, 0, 0, 3, 4], np.float32), 1, 1, (1, 1))]


def _shared(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    x = feeds["x"]
    if feeds["c"]:
        h = convolve(x, one(weights["first"]), BIAS, 1, 1, (1, 1))
    else:
        h = convolve(np.tanh(x), one(weights["second"]), None, 1, 2, (2, 2))
    return [convolve(np.maximum(h, 0), one(weights["third"]), None, 1, 1, (1, 1))]


def looped(x: Tensor, step: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the convolution reads at every turn, the last state, and all of them."""
    state, seen, read = np.zeros((4, 8, 1), np.float32), [], []
    for i in range(3):
        read.append(x[:, :, 3 * i : i + 10])
        state = np.tanh(state + convolve(read[-1], step, BIAS, 1, 1, (0, 0)).mean(axis=2, keepdims=True))
        seen.append(state[:, :, 0])
    return read, state, np.stack(seen, axis=2)


def _looped(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    _, state, seen = looped(feeds["x"], one(weights["step"]))
    return [state, convolve(seen, one(weights["after"]), None, 1, 1, (0, 0))]


def _scanned(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    state, seen = np.zeros((2, 8, 1, 1), np.float32), []
    for now in feeds["x"]:
        up = now.sum() > 0
        p = spread(now, weights["up"], BIAS, 3, 2, (0, 0)) if up else convolve(now, weights["flat"], None, 1, 1, (0, 0))
        state = np.tanh(state + p.mean(axis=(2, 3), keepdims=True))
        seen.append(state)
    return [state, np.stack(seen)]


def _looked_up(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    i = feeds["i"]
    if feeds["c"]:
        return [weights["main"][i] + weights["emb"][-i]]
    return [weights["main"][i] + weights["emb_1"][i] + constant("second", 31, 64)[i]]


TRAPS = (
    Trap(
        "conv-in-both-branches",
        lambda: model(EITHER, k=K, v=OTHER, b=BIAS),
        _images(4, 8, 16),
        _either,
        {"c": CONVERTED, "c_1": CONVERTED},
    ),
    Trap(
        "conv-of-constants-in-branches",
        lambda: model(HELD, b=BIAS),
        _images(4, 8, 16),
        _held,
        {"c": CONVERTED, "other": CONVERTED},
    ),
    *(
        Trap(
            f"conv-weight-shared-by-branches-{form}",
            lambda: model(SHARED, k=K, b=BIAS),
            _images(4, 8, 16),
            _shared,
            {"first": CONVERTED, "second": CONVERTED, "third": CONVERTED},
            {"conv_form": form},
        )
        for form in ("fold", "dequantize")
    ),
    Trap(
        "conv-in-a-loop-and-behind-it",
        lambda: model(LOOPED, k=K, v=OTHER, b=BIAS, start=np.zeros((4, 8, 1), np.float32)),
        _images(4, 8, 16, conditional=False),
        _looped,
        {"step": CONVERTED, "after": CONVERTED},
    ),
    Trap(
        "conv-in-an-if-in-a-scan",
        lambda: model(SCANNED, up=kernel(4, 4, 3, 3), flat=kernel(8, 2, 2, 2), b=BIAS, start=np.zeros((2, 8, 1, 1), np.float32)),
        _images(6, 2, 4, 3, 3, conditional=False),
        _scanned,
        {"up": CONVERTED, "flat": CONVERTED},
    ),
    Trap(
        "conv-in-a-sequence-map",
        lambda: model(
            """g (float[n, 8, 16] x) => (float[m, 8, 14] y) {
                parts = SplitToSequence<axis = 0>(x)
                mapped = SequenceMap(parts) <body = each (float[k, 8, 16] a) => (float[k, 8, 14] b) { [inner] b = Conv(a, v) }>
                h = ConcatFromSequence<axis = 0>(mapped)
                [c] y = Conv<pads = [1, 1]>(h, k)
            }""",
            k=K,
            v=OTHER,
        ),
        _images(4, 8, 16, conditional=False),
        lambda feeds, weights: [
            convolve(
                convolve(feeds["x"], OTHER.reshape(8, 24).T[None], None, 1, 1, (0, 0)),
                one(weights["c"]),
                None,
                1,
                1,
                (1, 1),
            )
        ],
        {"inner": "inside a subgraph or function", "c": CONVERTED},
    ),
    Trap(
        "table-left-float-in-a-branch",
        lambda: model(
            """g (int64[n] i, bool c, float[n, 64] x) => (float[n, 24] y) {
                h = If(c) <
                    then_branch = yes () => (float[n, 64] a) { [emb] a = Gather(table, i) },
                    else_branch = no () => (float[n, 64] d) { d = Relu(x) }
                >
                [fc] y = MatMul(h, w)
            }""",
            table=TABLE,
            w=constant("w", 64, 24),
        ),
        lambda rng: {
            "i": rng.integers(0, 1024, 7),
            "c": np.array(rng.random() < 0.5),
            "x": rng.standard_normal((7, 64), np.float32),
        },
        lambda feeds, weights: [(TABLE[feeds["i"]] if feeds["c"] else np.maximum(feeds["x"], 0)) @ weights["fc"]],
        {"emb": UNASKED, "fc": CONVERTED},
    ),
    *(
        Trap(
            f"table-in-both-branches-{form}",
            lambda: model(LOOKED_UP, table=TABLE, second=constant("second", 31, 64)),
            lambda rng: {"i": rng.integers(0, 31, 9), "c": np.array(rng.random() < 0.5)},
            _looked_up,
            {"main": CONVERTED, "emb": CONVERTED, "emb_1": CONVERTED},
            {"embeddings": form},
        )
        for form in ("gather-block-quantized", "dequantize")
    ),
)
