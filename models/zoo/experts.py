"""Mixtures of experts. Tokens come from as many places as there are experts, and the router sends each to the expert of its place: any
other would give something else. The weight of experts is that of both layers, ``(E, H, F + I)``, the second one transposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Tensors, Trap, constant, model

E, H, UNITS, N = 6, 32, 48, 24
PLACES, W = constant("places", E, H) * np.float32(6), constant("w", H, N)
ROUTER = "decides which experts see a token (include it to convert it all the same)"
OPTIONS = {"format": "matmulnbits", "bits": 8, "block_size": None}  # blocks of 8 bits are multiplied by int8 activations


def _tokens(rng: np.random.Generator) -> dict[str, Tensor]:
    """Tokens around all places."""
    place = rng.integers(0, E, (3, 7))
    return {"x": (PLACES[place] + rng.standard_normal((3, 7, H)) / 4).astype(np.float32)}


def _build(attributes: str, rows: int, bias: bool) -> onnx.ModelProto:
    text = f"""g (float[n, t, {H}] x) => (float[n, t, {N}] y) {{
        flat = Reshape(x, shape)
        [router] products = MatMul(flat, r)
        scores = Add(products, level)
        [moe] h = com.microsoft.MoE<{attributes}>(x, scores, w1, {"b1" if bias else ""}, w2 {", b2" if bias else ""})
        [fc] y = MatMul(h, w)
    }}"""
    weights: dict[str, Any] = {"w1": constant("w1", E, rows, H), "w2": constant("w2", E, H, UNITS)}
    weights |= {"b1": _bias(rows), "b2": _bias(H)} if bias else {}
    domains = ("com.microsoft",)
    return model(text, domains=domains, shape=np.array([-1, H]), r=PLACES.T.copy(), level=constant("level", E), w=W, **weights)


def _bias(width: int) -> Tensor:
    return constant("bias", E, width) / np.float32(4)


def _scores(x: Tensor) -> Tensor:
    product: Tensor = x.reshape(-1, H) @ PLACES.T + constant("level", E)
    return product


def _sigmoid(x: Tensor) -> Tensor:
    result: Tensor = 1 / (1 + np.exp(-x))
    return result


def _of_gated(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    """Two experts a token, which share it by the softmax of their scores."""
    x, scores, experts = feeds["x"].reshape(-1, H), _scores(feeds["x"]), weights["moe"]
    rows = []
    for token, row in zip(x, scores, strict=True):
        best = np.argsort(-row)[:2]
        shares = np.exp(row[best] - row.max())
        inner = [token @ experts[e][:, : 2 * UNITS] for e in best]
        outer = [(a[::2] * _sigmoid(a[::2]) * a[1::2]) @ experts[e][:, 2 * UNITS :].T for a, e in zip(inner, best, strict=True)]
        rows.append(sum(share * one for share, one in zip(shares / shares.sum(), outer, strict=True)))
    return [(np.stack(rows) @ weights["fc"]).reshape(3, 7, N)]


def _of_plain(feeds: Tensors, weights: Tensors) -> list[Tensor]:
    """One expert a token, by its share of the softmax of all scores."""
    x, scores, experts = feeds["x"].reshape(-1, H), _scores(feeds["x"]), weights["moe"]
    rows = []
    for token, row in zip(x, scores, strict=True):
        best, shares = int(row.argmax()), np.exp(row - row.max())
        inner = np.maximum(token @ experts[best][:, :UNITS] + _bias(UNITS)[best], 0)
        rows.append((shares[best] / shares.sum()) * (inner @ experts[best][:, UNITS:].T + _bias(H)[best]))
    return [(np.stack(rows) @ weights["fc"]).reshape(3, 7, N)]


FATES = {"router": ROUTER, "moe": CONVERTED, "fc": CONVERTED}
GATED = 'k = 2, activation_type = "swiglu", swiglu_fusion = 1, normalize_routing_weights = 1'
TRAPS = (
    Trap("experts-with-gates", lambda: _build(GATED, 2 * UNITS, False), _tokens, _of_gated, FATES, OPTIONS),
    Trap("experts-one-a-token", lambda: _build("k = 1", UNITS, True), _tokens, _of_plain, FATES, {**OPTIONS, "bias": "none"}),
)
