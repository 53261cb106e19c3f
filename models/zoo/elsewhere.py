"""Weights that are no layer's, or not to be touched: they stay, and the report says where and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Tensors, Trap, constant, model
from magr_onnx.report.reasons import Reason

K, N, H = 48, 24, 8
W, V = constant("w", K, N), constant("v", K, N)
STEP = np.float32(0.01)
CODES = np.clip(np.rint(V / STEP), -128, 127).astype(np.int8)
OTHER, FUSED = "an operator without a quantized form", "a fused operator that no format can replace"
QUANTIZED = "weight is quantized already"
MICROSOFT = ("com.microsoft",)


def _trap(
    name: str,
    text: str,
    evaluate: Callable[[Tensor, Tensors], list[Tensor]],
    layers: Mapping[str, str],
    initializers: Mapping[str, Tensor],
    shape: tuple[int, ...] = (5, K),
    requantize: bool = False,
    keep_overridable: bool = False,
    domains: tuple[str, ...] = (),
    opset: int = 17,
) -> Trap:
    """A trap with one input ``x`` and, beside what it is about, an ordinary layer ``fc``."""

    def build() -> onnx.ModelProto:
        given: dict[str, Any] = dict(initializers)
        return model(text, domains=domains, opset=opset, **given)

    return Trap(
        name,
        build,
        lambda rng: {"x": rng.standard_normal(shape, np.float32)},
        lambda feeds, weights: evaluate(feeds["x"], weights),
        layers,
        {name: True for name, given in (("requantize", requantize), ("keep_overridable", keep_overridable)) if given},
    )


def _recurrent(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """The states of an Elman network, ``tanh(x_t W^T + h R^T)``, from zero; ``(T, batch, H)``."""
    states, h = [], np.zeros((x.shape[1], len(w)), np.float32)
    for row in x:
        h = np.tanh(row @ w.T + h @ r.T)
        states.append(h)
    return np.stack(states)


def _attention(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One head of self-attention over ``x (batch, T, K)``."""
    q, k, v = np.split(x @ w + b, 3, axis=-1)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Tensor = weights / weights.sum(axis=-1, keepdims=True) @ v
    return result


_BEHIND_DEQUANTIZE = """g (float[n, 48] x) => (float[n, 24] y) {
    floats = DequantizeLinear(codes, step)
    [old] h = MatMul(x, floats)
    [fc] p = MatMul(x, w)
    y = Add(h, p)
}"""

TRAPS = (
    _trap(
        "quantized-weight-stays",
        _BEHIND_DEQUANTIZE,
        lambda x, w: [x @ (CODES * STEP) + x @ w["fc"]],
        {"fc": CONVERTED, "old": QUANTIZED},
        {"w": W, "codes": CODES, "step": np.asarray(STEP)},
    ),
    _trap(
        "quantized-weight-again",
        _BEHIND_DEQUANTIZE,
        lambda x, w: [x @ w["old"] + x @ w["fc"]],
        {"fc": CONVERTED, "old": CONVERTED},
        {"w": W, "codes": CODES, "step": np.asarray(STEP)},
        requantize=True,
    ),
    _trap(
        "quantized-by-channel-again",
        """g (float[n, 48] x) => (float[n, 24] y) {
            floats = DequantizeLinear<axis = 0>(codes, steps, zeros)
            kn = Transpose(floats)
            [fc] y = MatMul(x, kn)
        }""",
        lambda x, w: [x @ w["fc"]],
        {"fc": CONVERTED},
        {
            "codes": np.ascontiguousarray(CODES.T),
            "steps": np.linspace(0.01, 0.02, N, dtype=np.float32),
            "zeros": np.arange(-12, 12, dtype=np.int8),
        },
        requantize=True,
    ),
    _trap(
        "quantized-by-block-again",
        """g (float[n, 48] x) => (float[n, 24] y) {
            floats = DequantizeLinear<axis = 0, block_size = 16>(codes, steps)
            [fc] y = Gemm(x, floats)
        }""",
        lambda x, w: [x @ w["fc"]],
        {"fc": CONVERTED},
        {"codes": CODES, "steps": np.abs(constant("steps", 3, N)) / 50},
        requantize=True,
        opset=21,
    ),
    _trap(
        "quantized-in-the-graph-again",
        """g (float[n, 48] x) => (float[n, 24] y) {
            codes = QuantizeLinear<axis = 0>(v, steps, zeros)
            floats = DequantizeLinear<axis = 0>(codes, steps, zeros)
            [fc] y = Gemm<transB = 1>(x, floats)
        }""",
        lambda x, w: [x @ w["fc"]],
        {"fc": CONVERTED},
        {
            "v": np.ascontiguousarray(V.T),
            "steps": np.linspace(0.01, 0.02, N, dtype=np.float32),
            "zeros": np.zeros(N, np.int8),
        },
        requantize=True,
    ),
    _trap(
        "caller-may-override",
        """g (float[n, 48] x, float[48, 24] v) => (float[n, 24] y) {
            [free] h = MatMul(x, v)
            [fc] p = MatMul(x, w)
            y = Add(h, p)
        }""",
        lambda x, w: [x @ V + x @ w["fc"]],
        {"fc": CONVERTED, "free": "weight is a graph input that a caller may override"},
        {"w": W, "v": V},
        keep_overridable=True,
    ),
    _trap(
        "weight-is-an-output",
        """g (float[n, 48] x) => (float[n, 24] y, float[24, 48] turned) {
            turned = Transpose(v)
            again = Transpose(turned)
            [shown] h = MatMul(x, again)
            [fc] p = MatMul(x, w)
            y = Add(h, p)
        }""",
        lambda x, w: [x @ V + x @ w["fc"], V.T],
        {"fc": CONVERTED, "shown": "weight is a graph output"},
        {"w": W, "v": V},
    ),
    _trap(
        "both-sides-constant",
        """g (float[n, 48] x) => (float[n, 24] y) {
            [known] h = MatMul(square, v)
            [fc] p = MatMul(x, w)
            [late] q = MatMul(x, h)
            y = Add(p, q)
        }""",
        lambda x, w: [x @ w["fc"] + x @ (constant("square", K, K) @ V)],
        {"fc": CONVERTED, "known": "both sides are constant", "late": "right side is computed at run time"},
        {"w": W, "v": V, "square": constant("square", K, K)},
    ),
    _trap(
        "recurrent",
        """g (float[t, n, 48] x) => (float[t, n, 64] y) <int64[1] one = {1}> {
            [rnn] states, last = RNN<hidden_size = 8>(x, rw, rr)
            flat = Squeeze(states, one)
            [fc] y = MatMul(flat, w)
        }""",
        lambda x, w: [_recurrent(x, constant("rw", 1, H, K)[0], constant("rr", 1, H, H)[0]) @ w["fc"]],
        {"fc": CONVERTED, "rnn": str(Reason.RECURRENT)},
        {"w": constant("w", H, 64), "rw": constant("rw", 1, H, K), "rr": constant("rr", 1, H, H)},
        (4, 3, K),
    ),
    _trap(
        "fused-attention",
        """g (float[n, t, 48] x) => (float[n, t, 24] y) {
            [attention] a = com.microsoft.Attention<num_heads = 1>(x, qkv, bias)
            [fc] y = MatMul(a, w)
        }""",
        lambda x, w: [_attention(x, constant("qkv", K, 3 * K), constant("bias", 3 * K)) @ w["fc"]],
        {"fc": CONVERTED, "attention": FUSED},
        {"w": W, "qkv": constant("qkv", K, 3 * K), "bias": constant("bias", 3 * K)},
        (2, 5, K),
        domains=MICROSOFT,
    ),
    _trap(
        "fused-matmul",
        """g (float[n, 48, t] x) => (float[n, t, 24] y) {
            [fc] y = com.microsoft.FusedMatMul<alpha = 0.5, transA = 1, transB = 1>(x, v)
        }""",
        lambda x, w: [0.5 * x.swapaxes(1, 2) @ w["fc"]],
        {"fc": CONVERTED},
        {"v": np.ascontiguousarray(V.T)},
        (2, K, 5),
        domains=MICROSOFT,
    ),
    _trap(
        "integer-product",
        """g (float[n, 48] x) => (float[n, 24] y) {
            q, s, z = DynamicQuantizeLinear(x)
            [old] sums = MatMulInteger(q, codes, z)
            real = Cast<to = 1>(sums)
            scaled = Mul(real, s)
            [fc] p = MatMul(x, w)
            h = Mul(scaled, step)
            y = Add(h, p)
        }""",
        lambda x, w: [_dynamic(x) @ (CODES * STEP) + x @ w["fc"]],
        {"fc": CONVERTED, "old": QUANTIZED},
        {"w": W, "codes": CODES, "step": np.asarray(STEP)},
    ),
    _trap(
        "table-that-is-added",
        """g (float[n, 60, 48] x) => (float[n, 60, 24] y) {
            [positions] h = Add(x, table)
            [fc] y = MatMul(h, w)
        }""",
        lambda x, w: [(x + constant("table", 60, K)) @ w["fc"]],
        {"fc": CONVERTED, "positions": OTHER},
        {"w": W, "table": constant("table", 60, K)},
        (2, 60, K),
    ),
)


def _dynamic(x: Tensor) -> Tensor:
    """What DynamicQuantizeLinear makes of x, in float32."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-np.float32(low) / scale), 0, 255)
    result: Tensor = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero).astype(np.float32) * scale
    return result
