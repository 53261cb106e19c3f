"""Linear layers that do not look like one: other operators, other sides, other ranks, other types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Tensors, Trap, constant, model

K, N, E = 48, 24, 3
W, B = constant("w", K, N), constant("b", N)
STACK = constant("stack", E, K, N)


def _trap(
    name: str,
    text: str,
    inputs: Mapping[str, Sequence[int]],
    evaluate: Callable[[Tensors, Tensors], Tensor],
    layers: Mapping[str, str] | None = None,
    initializers: Mapping[str, Tensor] | None = None,
    dtype: type[np.generic] = np.float32,
    options: Mapping[str, Any] | None = None,
    **of_model: Any,
) -> Trap:
    """A trap of one output; its only layer is called ``fc`` and is converted unless ``layers`` says otherwise."""

    def build() -> onnx.ModelProto:
        given: dict[str, Any] = {**of_model, **(initializers or {"w": W})}
        return model(text, **given)

    def feeds(rng: np.random.Generator) -> dict[str, Tensor]:
        return {name: rng.standard_normal(shape).astype(dtype) for name, shape in inputs.items()}

    def outputs(given: Tensors, weights: Tensors) -> list[Tensor]:
        return [evaluate(given, weights)]

    return Trap(name, build, feeds, outputs, layers or {"fc": CONVERTED}, options or {})


def _parts(weights: Tensors) -> Tensor:
    """The matrices of a stack, as they are in the file."""
    return np.stack([weights[f"fc[{i}]"] for i in range(E)])


STACKED = {f"fc[{i}]": CONVERTED for i in range(E)}
EINSUM = "an Einsum that is no product with a constant matrix"

CHAINS = (
    _trap(
        "weight-behind-views-and-casts",
        """g (float[n, 48] x) => (float[n, 24] y)
        <int64[3] three = {3, 8, -1}, int64[2] two = {0, -1}, int64[2] back = {24, 48}> {
            cube = Reshape(w, three)
            turned = Transpose<perm = [1, 0, 2]>(cube)
            again = Transpose<perm = [1, 0, 2]>(turned)
            flat = Flatten<axis = 0>(again)
            same = Identity(flat)
            rows = Reshape(same, back)
            wide = Cast<to = 1>(rows)
            kn = Transpose(wide)
            [fc] y = MatMul(x, kn)
        }""",
        {"x": (7, K)},
        lambda f, w: f["x"] @ w["fc"],
        initializers={"w": np.ascontiguousarray(W.T).astype(np.float16)},
    ),
    _trap(
        "bias-behind-views",
        """g (float[n, t, 48] x) => (float[n, t, 24] y) <int64[1] zero = {0}> {
            row = Unsqueeze(b, zero)
            flat = Squeeze(row, zero)
            wide = Cast<to = 1>(flat)
            [fc] h = MatMul(x, w)
            y = Add(wide, h)
        }""",
        {"x": (2, 5, K)},
        lambda f, w: f["x"] @ w["fc"] + B.astype(np.float16),
        initializers={"w": W, "b": B.astype(np.float16)},
    ),
    _trap(
        "one-weight-split-for-three",
        """g (float[n, 48] x) => (float[n, 24] y) {
            a, b, c = Split<axis = 0>(stacked)
            at = Transpose(a)
            bt = Transpose(b)
            ct = Transpose(c)
            [q] qx = MatMul(x, at)
            [k] kx = MatMul(x, bt)
            [v] vx = MatMul(x, ct)
            s = Mul(qx, kx)
            y = Add(s, vx)
        }""",
        {"x": (7, K)},
        lambda f, w: (f["x"] @ w["q"]) * (f["x"] @ w["k"]) + f["x"] @ w["v"],
        {"q": CONVERTED, "k": CONVERTED, "v": CONVERTED},
        {"stacked": constant("stacked", 3 * N, K) / 3},
    ),
    _trap(
        "weight-that-expands-is-not-followed",
        """g (float[n, 48] x) => (float[n, 24] y) <int64[2] shape = {48, 24}> {
            wide = Expand(column, shape)
            [wide] h = MatMul(x, wide)
            [fc] p = MatMul(x, w)
            y = Add(h, p)
        }""",
        {"x": (5, K)},
        lambda f, w: f["x"] @ np.broadcast_to(constant("column", K, 1), (K, N)) + f["x"] @ w["fc"],
        {"fc": CONVERTED, "wide": "right side is computed at run time"},
        {"w": W, "column": constant("column", K, 1)},
    ),
)

SIDES = (
    _trap(
        "gemm-transposed-input",
        "g (float[48, n] x) => (float[n, 24] y) { [fc] y = Gemm<transA = 1, alpha = 0.5, beta = 3.0>(x, w, b) }",
        {"x": (K, 6)},
        lambda f, w: f["x"].T @ w["fc"] + 3 * B,
        initializers={"w": W, "b": B},
    ),
    _trap(
        "matmul-constant-left",
        "g (float[n, 48, t] x) => (float[n, 24, t] y) { [fc] y = MatMul(w, x) }",
        {"x": (2, K, 5)},
        lambda f, w: w["fc"].T @ f["x"],
        initializers={"w": np.ascontiguousarray(W.T)},
    ),
    _trap(
        "gemm-constant-left-and-matrix-added",
        """g (float[n, 48] x, float[24, n] c) => (float[24, n] y) {
            [fc] y = Gemm<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>(w, x, c)
        }""",
        {"x": (6, K), "c": (N, 6)},
        lambda f, w: w["fc"].T @ f["x"].T + 2 * f["c"],
    ),
    _trap(
        "gemm-bias-at-run-time",
        "g (float[n, 48] x, float[n, 24] c) => (float[n, 24] y) { [fc] y = Gemm<beta = 0.5>(x, w, c) }",
        {"x": (6, K), "c": (6, N)},
        lambda f, w: f["x"] @ w["fc"] + 0.5 * f["c"],
    ),
    _trap(
        "gemm-bias-a-column",
        "g (float[6, 48] x) => (float[6, 24] y) { [fc] y = Gemm(x, w, c) }",
        {"x": (6, K)},
        lambda f, w: f["x"] @ w["fc"] + constant("c", 6, 1),
        initializers={"w": W, "c": constant("c", 6, 1)},
    ),
)

VECTORS = (
    _trap(
        "vector-right",
        "g (float[n, t, 48] x) => (float[n, t] y) { [fc] y = MatMul(x, w) }",
        {"x": (2, 5, K)},
        lambda f, w: f["x"] @ w["fc"][:, 0],
        initializers={"w": W[:, 0].copy()},
    ),
    _trap(
        "vector-left",
        "g (float[n, 48, t] x) => (float[n, t] y) { [fc] y = MatMul(w, x) }",
        {"x": (2, K, 5)},
        lambda f, w: w["fc"][:, 0] @ f["x"],
        initializers={"w": W[:, 0].copy()},
    ),
    _trap(
        "vector-input",
        "g (float[48] x) => (float[24] y) { [fc] y = MatMul(x, w) }",
        {"x": (K,)},
        lambda f, w: f["x"] @ w["fc"],
    ),
    _trap(
        "matrix-left-of-a-vector",
        "g (float[48] x) => (float[24] y) { [fc] y = MatMul(w, x) }",
        {"x": (K,)},
        lambda f, w: w["fc"].T @ f["x"],
        initializers={"w": np.ascontiguousarray(W.T)},
    ),
    _trap(
        "two-vectors",
        "g (float[48] x) => (float y) { [fc] y = MatMul(w, x) }",
        {"x": (K,)},
        lambda f, w: w["fc"][:, 0] @ f["x"],
        initializers={"w": W[:, 0].copy()},
    ),
)

EINSUMS = (
    _trap(
        "einsum-heads-out",
        'g (float[n, t, 48] x) => (float[n, t, 4, 6] y) { [fc] y = Einsum<equation = "bsd,dhk->bshk">(x, w) }',
        {"x": (2, 5, K)},
        lambda f, w: (f["x"] @ w["fc"]).reshape(2, 5, 4, 6),
        initializers={"w": W.reshape(K, 4, 6)},
    ),
    _trap(
        "einsum-heads-in",
        'g (float[n, t, 6, 8] x) => (float[n, t, 24] y) { [fc] y = Einsum<equation = "bshk, hkd -> bsd">(x, w) }',
        {"x": (2, 5, 6, 8)},
        lambda f, w: f["x"].reshape(2, 5, K) @ w["fc"],
        initializers={"w": W.reshape(6, 8, N)},
    ),
    _trap(
        "einsum-implicit-result-constant-first",
        'g (float[48, n] x) => (float[24, n] y) { [fc] y = Einsum<equation = "ji,jk">(w, x) }',
        {"x": (K, 5)},
        lambda f, w: w["fc"].T @ f["x"],
    ),
    _trap(
        "einsum-ellipsis-and-bias",
        """g (float[n, t, 48] x) => (float[n, t, 24] y) {
            [fc] h = Einsum<equation = "...d,fd->...f">(x, w)
            y = Add(h, b)
        }""",
        {"x": (2, 5, K)},
        lambda f, w: f["x"] @ w["fc"] + B,
        initializers={"w": np.ascontiguousarray(W.T), "b": B},
    ),
    _trap(
        "einsum-experts-summed-axis",
        'g (float[n, 3, 2, 48] x) => (float[3, 24, n] y) { [fc] y = Einsum<equation = "beak,ekn->enb">(x, w) }',
        {"x": (4, E, 2, K)},
        lambda f, w: np.einsum("bek,ekn->enb", f["x"].sum(axis=2), _parts(w)),
        STACKED,
        {"w": STACK},
    ),
    _trap(
        "einsum-that-is-no-product",
        """g (float[n, 48] x) => (float[n, 24] y) {
            [scaled] s = Einsum<equation = "nk,k->nk">(x, scales)
            [fc] y = MatMul(s, w)
        }""",
        {"x": (4, K)},
        lambda f, w: (f["x"] * constant("scales", 1, K)) @ w["fc"],
        {"fc": CONVERTED, "scaled": EINSUM},
        initializers={"w": W, "scales": constant("scales", 1, K)[0]},
    ),
    _trap(
        "einsum-elementwise-matrix-and-diagonal",
        """g (float[48, 48] x) => (float[24] y) {
            [scaled] s = Einsum<equation = "nk,nk->nk">(x, scales)
            [diagonal] d = Einsum<equation = "kk,kj->j">(s, square)
            [fc] y = MatMul(d, w)
        }""",
        {"x": (K, K)},
        lambda f, w: np.einsum("kk,kj->j", f["x"] * constant("scales", K, K), constant("square", K, K)) @ w["fc"],
        {"fc": CONVERTED, "scaled": EINSUM, "diagonal": EINSUM},
        {"w": W, "scales": constant("scales", K, K), "square": constant("square", K, K)},
    ),
)

BODIES = (
    _trap(
        "disguised-in-two-bodies",
        """g (float[n, 48] x) => (float[n, 24] y) <float zero = {0.0}> {
            sum = ReduceSum<keepdims = 0>(x)
            c = Greater(sum, zero)
            y = If (c) <
                then_branch = t () => (float[n, 24] a) { [up] a = Einsum<equation = "bk,hk->bh">(x, w) },
                else_branch = e () => (float[n, 24] a) {
                    h = Transpose(x)
                    [down] p = MatMul(w, h)
                    a = Transpose(p)
                }
            >
        }""",
        {"x": (6, K)},
        lambda f, w: f["x"] @ w["up" if f["x"].sum() > 0 else "down"],
        {"up": CONVERTED, "down": CONVERTED},
        {"w": np.ascontiguousarray(W.T)},
    ),
)

STACKS = (
    _trap(
        "experts-share-an-input",
        "g (float[n, 48] x) => (float[3, n, 24] y) { [fc] y = MatMul(x, w) }",
        {"x": (5, K)},
        lambda f, w: f["x"] @ _parts(w),
        STACKED,
        {"w": STACK},
    ),
    _trap(
        "experts-with-their-own-inputs",
        """g (float[n, t, 48] x) => (float[n, 3, t, 24] y) <int64[4] heads = {0, 1, -1, 48}> {
            one = Reshape(x, heads)
            three = Concat<axis = 1>(one, one, one)
            [fc] h = MatMul(three, w)
            y = Add(h, b)
        }""",
        {"x": (2, 5, K)},
        lambda f, w: f["x"][:, None] @ _parts(w) + B,
        STACKED,
        {"w": STACK, "b": B},
    ),
    _trap(
        "experts-of-unknown-inputs",
        "g (float[a, t, 48] x) => (float[3, t, 24] y) { [fc] y = MatMul(x, w) }",
        {"x": (1, 5, K)},
        lambda f, w: f["x"] @ _parts(w),
        STACKED,
        {"w": STACK},
    ),
    _trap(
        "axes-of-one-before-the-matrix",
        "g (float[n, 48] x) => (float[1, 1, n, 24] y) { [fc] y = MatMul(x, w) }",
        {"x": (5, K)},
        lambda f, w: (f["x"] @ w["fc"])[None, None],
        initializers={"w": W[None, None]},
    ),
    _trap(
        "two-axes-before-the-matrix",
        """g (float[n, 48] x) => (float[2, 3, n, 24] y) {
            [grid] h = MatMul(x, grid)
            [fc] p = MatMul(x, w)
            y = Add(h, p)
        }""",
        {"x": (5, K)},
        lambda f, w: f["x"] @ constant("grid", 2, 3, K, N) + f["x"] @ w["fc"],
        {"fc": CONVERTED, "grid": "weight is not two-dimensional"},
        {"w": W, "grid": constant("grid", 2, 3, K, N)},
    ),
)

TYPES = (
    _trap(
        "double",
        """g (double[n, 48] x) => (double[n, 24] y) {
            [fc] h = MatMul(x, w)
            y = Add(h, b)
        }""",
        {"x": (5, K)},
        lambda f, w: f["x"] @ w["fc"].astype(np.float64) + B,
        initializers={"w": W.astype(np.float64), "b": B.astype(np.float64)},
        dtype=np.float64,
    ),
    _trap(
        "double-gemm",
        "g (double[48, n] x) => (double[n, 24] y) { [fc] y = Gemm<transA = 1, transB = 1, alpha = 2.0>(x, w, b) }",
        {"x": (K, 5)},
        lambda f, w: f["x"].T @ w["fc"].astype(np.float64) + B,
        initializers={"w": np.ascontiguousarray(W.T).astype(np.float64), "b": B.astype(np.float64)},
        dtype=np.float64,
    ),
    _trap(
        "half-precision-experts",
        "g (float16[n, 48] x) => (float16[3, n, 24] y) { [fc] y = MatMul(x, w) }",
        {"x": (5, K)},
        lambda f, w: f["x"] @ _parts(w),
        STACKED,
        {"w": STACK.astype(np.float16)},
        dtype=np.float16,
    ),
    _trap(
        "integers",
        """g (float[n, 48] x) => (float[n, 24] y) {
            i = Cast<to = 6>(x)
            [whole] j = MatMul(i, table)
            f = Cast<to = 1>(j)
            [fc] h = MatMul(x, w)
            y = Add(h, f)
        }""",
        {"x": (5, K)},
        lambda f, w: f["x"] @ w["fc"] + f["x"].astype(np.int32) @ np.eye(K, N, dtype=np.int32),
        {"fc": CONVERTED, "whole": "weight type is not float32 or float16"},
        {"w": W, "table": np.eye(K, N, dtype=np.int32)},
    ),
)
TRAPS = (*CHAINS, *SIDES, *VECTORS, *EINSUMS, *BODIES, *STACKS, *TYPES)
