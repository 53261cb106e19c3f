"""Layers in the bodies of If, Loop and Scan, in functions, and weights that several nodes read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Tensors, Trap, constant, model

W, V, U = constant("w", 48, 24), constant("v", 48, 24), constant("u", 24, 24)
SQUARE, BIAS = constant("square", 32, 32), constant("bias", 24)
TABLE = constant("table", 40, 32)
LOCAL = ("local",)


def _inputs(**shapes: tuple[int, ...]) -> Callable[[np.random.Generator], dict[str, Tensor]]:
    return lambda rng: {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _choosing(*, often: float = 0.5, **shapes: tuple[int, ...]) -> Callable[[np.random.Generator], dict[str, Tensor]]:
    """Inputs, and a condition that is true as often as this."""
    return lambda rng: {**_inputs(**shapes)(rng), "c": np.array(rng.random() < often)}


def _relu(x: Tensor) -> Tensor:
    return np.maximum(x, 0)


def _loop(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    state, seen = feeds["s"], []
    for _ in range(3):
        state = np.tanh(state @ weights["step"])
        seen.append(state)
    return [state, np.stack(seen)]


def _nested(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    state = feeds["s"]
    for i in range(4):
        state = np.tanh(state @ weights["even"]) if i % 2 == 0 else state @ weights["odd"] / 2
    return [state]


def _scan(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    state, seen = np.zeros((2, 24), np.float32), []
    for x in feeds["x"]:
        state = np.tanh(x @ weights["in"] + state @ weights["back"])
        seen.append(state)
    return [state, np.stack(seen)]


def _carrying(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    state = feeds["s"]
    for _ in range(3):
        state = np.tanh(state @ weights["in"] @ weights["back"])
    return [state]


def _growing(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    total: Tensor = np.zeros((1, 24), np.float32)
    for i in range(3):
        total = total + (feeds["x"][: i + 1] @ weights["fc"]).sum(axis=0, keepdims=True)
    return [total]


TRAPS = (
    Trap(
        "if-both-branches",
        lambda: model(
            """g (float[n, 48] x, bool c) => (float[n, 24] y) {
                h = If(c) <
                    then_branch = yes () => (float[n, 24] a) { [fc] h = MatMul(x, w)  a = Add(h, b) },
                    else_branch = no () => (float[n, 24] a) { [other] h = MatMul(x, v)  a = Relu(h) }
                >
                y = Tanh(h)
            }""",
            w=W,
            v=V,
            b=BIAS,
        ),
        _choosing(x=(7, 48)),
        lambda feeds, w: [np.tanh(feeds["x"] @ w["fc"] + BIAS if feeds["c"] else _relu(feeds["x"] @ w["other"]))],
        {"fc": CONVERTED, "other": CONVERTED},
    ),
    Trap(
        "names-in-both-branches",
        lambda: model(
            """g (float[n, 48] x, bool c) => (float[n, 24] y) {
                y = If(c) <
                    then_branch = yes () => (float[n, 24] a) {
                        k = Constant<value = float {2}>()
                        r = Mul(x, k)
                        [fc] a = MatMul(r, w)
                    },
                    else_branch = no () => (float[n, 24] a) { r = Relu(x)  [fc] a = MatMul(r, v) }
                >
            }""",
            w=W,
            v=V,
        ),
        _choosing(x=(7, 48)),
        lambda feeds, w: [2 * feeds["x"] @ w["fc"] if feeds["c"] else _relu(feeds["x"]) @ w["fc_1"]],
        {"fc": CONVERTED, "fc_1": CONVERTED},
    ),
    Trap(
        "if-branch-never-taken",
        lambda: model(
            """g (float[n, 48] x, bool c) => (float[n, 24] y) {
                y = If(c) <
                    then_branch = yes () => (float[n, 24] a) { r = Relu(x)  [fc] a = Gemm(r, w, b) },
                    else_branch = no () => (float[n, 24] d) { t = Tanh(x)  [never] d = MatMul(t, v) }
                >
            }""",
            w=W,
            v=V,
            b=BIAS,
        ),
        _choosing(often=1, x=(7, 48)),
        lambda feeds, w: [_relu(feeds["x"]) @ w["fc"] + BIAS],
        {"fc": CONVERTED, "never": CONVERTED},
    ),
    Trap(
        "weights-in-a-branch",
        lambda: model(
            """g (float[n, 24] x, bool c) => (float[n, 24] y) {
                y = If(c) <
                    then_branch = yes () => (float[n, 24] a) <float[24, 24] inner = {%s}> { [fc] a = MatMul(x, inner) },
                    else_branch = no () => (float[n, 24] d) {
                        held = Constant<value = float[24, 24] {%s}>()
                        [other] d = MatMul(x, held)
                    }
                >
            }"""
            % ((", ".join(f"{v:.9g}" for v in U.reshape(-1)),) * 2)
        ),
        _choosing(x=(7, 24)),
        lambda feeds, w: [feeds["x"] @ (w["fc"] if feeds["c"] else w["other"])],
        {"fc": CONVERTED, "other": CONVERTED},
    ),
    Trap(
        "loop-with-carried-state",
        lambda: model(
            """g (float[n, 32] s) => (float[n, 32] y, float[t, n, 32] all) {
                trips = Constant<value = int64 {3}>()
                go = Constant<value = bool {1}>()
                y, all = Loop(trips, go, s) <body = turn (int64 i, bool c, float[n, 32] state) =>
                    (bool next, float[n, 32] out, float[n, 32] seen) {
                        next = Identity(c)
                        [step] h = MatMul(state, w)
                        out = Tanh(h)
                        seen = Identity(out)
                    }>
            }""",
            w=SQUARE,
        ),
        _inputs(s=(5, 32)),
        _loop,
        {"step": CONVERTED},
    ),
    Trap(
        "if-in-a-loop",
        lambda: model(
            """g (float[n, 32] s) => (float[n, 32] y) {
                trips = Constant<value = int64 {4}>()
                two = Constant<value = int64 {2}>()
                zero = Constant<value = int64 {0}>()
                half = Constant<value = float {0.5}>()
                go = Constant<value = bool {1}>()
                y = Loop(trips, go, s) <body = turn (int64 i, bool c, float[n, 32] state) => (bool next, float[n, 32] out) {
                    next = Identity(c)
                    rest = Mod(i, two)
                    even = Equal(rest, zero)
                    out = If(even) <
                        then_branch = yes () => (float[n, 32] a) { [even] h = MatMul(state, w)  a = Tanh(h) },
                        else_branch = no () => (float[n, 32] a) { [odd] h = MatMul(state, v)  a = Mul(h, half) }
                    >
                }>
            }""",
            w=SQUARE,
            v=np.ascontiguousarray(SQUARE[::-1]),
        ),
        _inputs(s=(5, 32)),
        _nested,
        {"even": CONVERTED, "odd": CONVERTED},
    ),
    Trap(
        "scan",
        lambda: model(
            """g (float[t, 2, 48] x) => (float[2, 24] y, float[t, 2, 24] all) {
                y, all = Scan(start, x) <num_scan_inputs = 1, body = turn (float[2, 24] state, float[2, 48] now) =>
                    (float[2, 24] out, float[2, 24] seen) {
                        [in] a = MatMul(now, w)
                        [back] b = MatMul(state, u)
                        h = Add(a, b)
                        out = Tanh(h)
                        seen = Identity(out)
                    }>
            }""",
            start=np.zeros((2, 24), np.float32),
            w=W,
            u=U,
        ),
        _inputs(x=(6, 2, 48)),
        _scan,
        {"in": CONVERTED, "back": CONVERTED},
    ),
    Trap(
        "weights-that-a-loop-carries",
        lambda: model(
            """g (float[n, 32] s) => (float[n, 32] y) {
                trips = Constant<value = int64 {3}>()
                go = Constant<value = bool {1}>()
                p, q, y = Loop(trips, go, w, u, s) <
                    body = turn (int64 i, bool c, float[32, 24] a, float[24, 32] b, float[n, 32] state) =>
                    (bool next, float[32, 24] a, float[24, 32] d, float[n, 32] out) {
                        next = Identity(c)
                        [in] h = MatMul(state, a)
                        [back] k = MatMul(h, b)
                        out = Tanh(k)
                        d = Identity(b)
                    }>
            }""",
            w=constant("w", 32, 24),
            u=constant("u", 24, 32),
        ),
        _inputs(s=(5, 32)),
        _carrying,
        {"in": CONVERTED, "back": CONVERTED},
    ),
    Trap(
        "weights-that-a-scan-carries",
        lambda: model(
            """g (float[t, 2, 48] x) => (float[2, 24] y, float[t, 2, 24] all) {
                kept, y, all = Scan(w, start, x) <
                    num_scan_inputs = 1, body = turn (float[48, 24] a, float[2, 24] state, float[2, 48] now) =>
                    (float[48, 24] e, float[2, 24] out, float[2, 24] seen) {
                        e = Identity(a)
                        [in] g = MatMul(now, a)
                        [back] b = MatMul(state, u)
                        h = Add(g, b)
                        out = Tanh(h)
                        seen = Identity(out)
                    }>
            }""",
            start=np.zeros((2, 24), np.float32),
            w=W,
            u=U,
        ),
        _inputs(x=(6, 2, 48)),
        _scan,
        {"in": CONVERTED, "back": CONVERTED},
    ),
    Trap(
        "loop-whose-rows-change",
        lambda: model(
            """g (float[5, 48] x) => (float[1, 24] y) {
                trips = Constant<value = int64 {3}>()
                go = Constant<value = bool {1}>()
                one = Constant<value = int64[1] {1}>()
                axis = Constant<value = int64[1] {0}>()
                y = Loop(trips, go, start) <body = turn (int64 i, bool c, float[1, 24] total) => (bool next, float[1, 24] out) {
                    next = Identity(c)
                    shape = Reshape(i, one)
                    end = Add(shape, one)
                    part = Slice(x, axis, end, axis)
                    [fc] h = MatMul(part, w)
                    s = ReduceSum(h, axis)
                    out = Add(total, s)
                }>
            }""",
            start=np.zeros((1, 24), np.float32),
            w=W,
        ),
        _inputs(x=(5, 48)),
        _growing,
        {"fc": CONVERTED},
    ),
    Trap(
        "function-with-weights-passed-in",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 24] y) {
                h = local.dense(x, w, b)
                y = local.plain(h)
            }
            <domain: "local", opset_import: ["": 17]>
            dense (a, m, v) => (o) { [fc] p = MatMul(a, m)  o = Add(p, v) }
            <domain: "local", opset_import: ["": 17]>
            plain (a) => (o) { t = Tanh(a)  o = Abs(t) }""",
            domains=LOCAL,
            w=W,
            b=BIAS,
        ),
        _inputs(x=(7, 48)),
        lambda feeds, w: [np.abs(np.tanh(feeds["x"] @ w["fc"] + BIAS))],
        {"fc": CONVERTED},
    ),
    Trap(
        "function-called-twice-with-different-weights",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 24] y) {
                a = local.dense<scale = 1.0>(x, w)
                b = local.dense<scale = 0.5>(x, v)
                y = Add(a, b)
            }
            <domain: "local", opset_import: ["": 17]>
            dense <scale> (a, m) => (o) { [fc] o = Gemm<alpha: float = @scale>(a, m) }""",
            domains=LOCAL,
            w=W,
            v=V,
        ),
        _inputs(x=(7, 48)),
        lambda feeds, w: [feeds["x"] @ w["fc"] + feeds["x"] @ w["fc_2"]],
        {"fc": CONVERTED, "fc_2": CONVERTED},
    ),
    Trap(
        "function-in-a-function",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 24] y) {
                h = local.outer(x, w)
                y = local.outer(h, u)
            }
            <domain: "local", opset_import: ["": 17, "deeper": 1]>
            outer (a, m) => (o) { p = deeper.dense(a, m)  o = Tanh(p) }
            <domain: "deeper", opset_import: ["": 17]>
            dense (a, m) => (o) { [fc] o = MatMul(a, m) }""",
            domains=("local", "deeper"),
            w=W,
            u=U,
        ),
        _inputs(x=(7, 48)),
        lambda feeds, w: [np.tanh(np.tanh(feeds["x"] @ w["fc"]) @ w["fc_2"])],
        {"fc": CONVERTED, "fc_2": CONVERTED},
    ),
    Trap(
        "branch-in-a-function-called-twice",
        lambda: model(
            """g (float[n, 24] x, bool c) => (float[n, 24] y) {
                h = local.either(x, c, u)
                y = local.either(h, c, u)
            }
            <domain: "local", opset_import: ["": 17]>
            either (a, c, m) => (o) {
                o = If(c) <
                    then_branch = yes () => (float[n, 24] p) { [fc] q = MatMul(a, m)  p = Tanh(q) },
                    else_branch = no () => (float[n, 24] r) { r = Relu(a) }
                >
            }""",
            domains=LOCAL,
            u=U,
        ),
        _choosing(x=(7, 24)),
        lambda feeds, w: [np.tanh(np.tanh(feeds["x"] @ w["fc"]) @ w["fc_2"]) if feeds["c"] else _relu(feeds["x"])],
        {"fc": CONVERTED, "fc_2": CONVERTED},
    ),
    Trap(
        "weight-shared-by-two-layers",
        lambda: model(
            """g (float[n, 24] x) => (float[n, 24] y) {
                [first] h = MatMul(x, u)
                t = Tanh(h)
                [second] p = MatMul(t, u)
                y = Add(p, b)
            }""",
            u=U,
            b=BIAS,
        ),
        _inputs(x=(7, 24)),
        lambda feeds, w: [np.tanh(feeds["x"] @ w["first"]) @ w["second"] + BIAS],
        {"first": CONVERTED, "second": CONVERTED},
    ),
    Trap(
        "weight-shared-by-three-layers",
        lambda: model(
            """g (float[n, 24] x, bool c) => (float[n, 24] y) {
                [first] h = Gemm(x, u, b)
                t = Tanh(h)
                i = If(c) <
                    then_branch = yes () => (float[n, 24] a) { [second] a = MatMul(t, u) },
                    else_branch = no () => (float[n, 24] d) { d = Relu(t) }
                >
                [third] y = MatMul(i, u)
            }""",
            u=U,
            b=BIAS,
        ),
        _choosing(x=(7, 24)),
        lambda feeds, w: [(t @ w["second"] if feeds["c"] else _relu(t)) @ w["third"] for t in [np.tanh(feeds["x"] @ w["first"] + BIAS)]],
        {"first": CONVERTED, "second": CONVERTED, "third": CONVERTED},
    ),
    Trap(
        "weight-and-its-transpose",
        lambda: model(
            """g (float[n, 48] x) => (float[n, 48] y) {
                [down] h = MatMul(x, w)
                t = Tanh(h)
                [up] y = Gemm<transB = 1>(t, w)
            }""",
            w=W,
        ),
        _inputs(x=(7, 48)),
        lambda feeds, w: [np.tanh(feeds["x"] @ w["down"]) @ w["up"]],
        {"down": CONVERTED, "up": CONVERTED},
    ),
    Trap(
        "tied-embedding",
        lambda: model(
            """g (int64[n] ids) => (float[n, 40] logits) {
                h = Gather(table, ids)
                t = Tanh(h)
                turned = Transpose<perm = [1, 0]>(table)
                [head] logits = MatMul(t, turned)
            }""",
            table=TABLE,
        ),
        lambda rng: {"ids": rng.integers(0, 40, 9)},
        lambda feeds, w: [np.tanh(TABLE[feeds["ids"]]) @ w["head"]],
        {"head": CONVERTED},
        {"include": ["*"]},
    ),
    Trap(
        "disguised-in-a-branch",
        lambda: model(
            """g (float[n, 24] x, bool c) => (float[n, 24] y) {
                y = If(c) <
                    then_branch = yes () => (float[n, 24] a) <float[n, 24] r> {
                        r = Relu(x)
                        [sum] a = Einsum<equation = "nk,km->nm">(r, u)
                    },
                    else_branch = no () => (float[n, 24] d) <float[24, n] t, float[24, n] h> {
                        t = Transpose(x)
                        [left] h = MatMul(v, t)
                        d = Transpose(h)
                    }
                >
            }""",
            u=U,
            v=np.ascontiguousarray(U[::-1]),
        ),
        _choosing(x=(7, 24)),
        lambda feeds, w: [_relu(feeds["x"]) @ w["sum"] if feeds["c"] else feeds["x"] @ w["left"]],
        {"sum": CONVERTED, "left": CONVERTED},
    ),
    Trap(
        "body-of-a-sequence-map",
        lambda: model(
            """g (float[n, 48] x) => (float[m, 24] y) {
                [fc] h = MatMul(x, w)
                parts = SplitToSequence<axis = 0>(h)
                mapped = SequenceMap(parts) <body = each (float[k, 24] a) => (float[k, 24] b) { [inner] b = MatMul(a, u) }>
                y = ConcatFromSequence<axis = 0>(mapped)
            }""",
            w=W,
            u=U,
        ),
        _inputs(x=(7, 48)),
        lambda feeds, w: [feeds["x"] @ w["fc"] @ U],
        {"fc": CONVERTED, "inner": "inside a subgraph or function"},
    ),
)
