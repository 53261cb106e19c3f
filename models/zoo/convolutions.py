"""Convolutions of every kind, next to linear layers and alone.

The weight of a convolution is the matrix ``(K, N)`` of its one group, or ``(G, K, N)`` of several; see `magr_onnx.passes.layers.conv`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from magr_onnx.models.zoo.trap import CONVERTED, Tensor, Trap, constant, model


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, stride: int, dilation: int, pads: tuple[int, int]) -> Tensor:
    """A convolution of matrices ``w (G, K, N)`` over the spatial axes of ``x``, the same numbers on each, one output position at a time."""
    spatial = x.ndim - 2
    groups, k, n = w.shape
    inner = x.shape[1] // groups
    size = round((k / inner) ** (1 / spatial))
    x = np.pad(x, [(0, 0), (0, 0), *[pads] * spatial])
    out = [(d - dilation * (size - 1) - 1) // stride + 1 for d in x.shape[2:]]
    y = np.zeros((len(x), groups * n, *out), x.dtype)
    for at in np.ndindex(*out):
        window = tuple(slice(i * stride, i * stride + dilation * (size - 1) + 1, dilation) for i in at)
        for g in range(groups):
            patch = x[:, g * inner : (g + 1) * inner][(slice(None), slice(None), *window)].reshape(len(x), -1)
            y[:, g * n : (g + 1) * n][(slice(None), slice(None), *at)] = patch @ w[g]
    return y if bias is None else y + bias.reshape(-1, *[1] * spatial)


def spread(x: Tensor, w: Tensor, bias: Tensor | None, size: int, stride: int, pads: tuple[int, int]) -> Tensor:
    """A transposed convolution of ``w (G, K, N)`` on two spatial axes, every input value added to all outputs it reaches."""
    groups, k, n = w.shape
    inner = k // size**2
    height, width = ((d - 1) * stride + size for d in x.shape[2:])
    y = np.zeros((len(x), groups * n, height, width), x.dtype)
    for g, c, i, j in itertools.product(range(groups), range(inner), range(size), range(size)):
        row = w[g][(c * size + i) * size + j]
        part = x[:, g * inner + c, None] * row[None, :, None, None]
        y[:, g * n : (g + 1) * n, i : i + stride * x.shape[2] : stride, j : j + stride * x.shape[3] : stride] += part
    y = y[:, :, pads[0] : height - pads[1], pads[0] : width - pads[1]]
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def one(w: Tensor) -> Tensor:
    """A matrix as the only group."""
    return w[None]


def images(*shape: int, dtype: npt.DTypeLike = np.float32) -> Callable[[np.random.Generator], dict[str, Tensor]]:
    """Feeds of a shape."""
    return lambda rng: {"x": (rng.standard_normal(shape, np.float32) + np.float32(0.2)).astype(dtype)}


def kernel(*shape: int) -> Tensor:
    """The weight of a convolution ``(M, C / G, ...)``, of a size that keeps its outputs near one."""
    return np.ascontiguousarray(constant("kernel", math.prod(shape[1:]), shape[0]).T).reshape(shape)


B = constant("conv_b", 8)

TRAPS = (
    Trap(
        "conv-stride-dilation-pads",
        lambda: model(
            """g (float[n, 3, 11, 11] x) => (float[n, 8, h, w] y) {
                [c] y = Conv<strides = [2, 2], dilations = [2, 2], pads = [1, 1, 2, 2]>(x, k, b)
            }""",
            k=kernel(8, 3, 3, 3),
            b=B,
        ),
        images(4, 3, 11, 11),
        lambda feeds, weights: [convolve(feeds["x"], one(weights["c"]), B, 2, 2, (1, 2))],
        {"c": CONVERTED},
    ),
    Trap(
        "conv-groups-auto-pad",
        lambda: model(
            """g (float[n, 6, 8, 8] x) => (float[n, 8, 8, 8] y) {
                [c] y = Conv<group = 2, auto_pad = "SAME_UPPER">(x, k)
            }""",
            k=kernel(8, 3, 3, 3),
        ),
        images(4, 6, 8, 8),
        lambda feeds, weights: [convolve(feeds["x"], weights["c"], None, 1, 1, (1, 1))],
        {"c": CONVERTED},
    ),
    Trap(
        "conv-depthwise-and-a-linear-layer",
        lambda: model(
            """g (float[n, 16, 8, 8] x) => (float[n, 64] y) {
                [c] h = Conv<group = 16, pads = [1, 1, 1, 1]>(x, k, kb)
                r = Relu(h)
                p = GlobalAveragePool(r)
                f = Flatten(p)
                [fc] y = MatMul(f, w)
            }""",
            k=kernel(16, 1, 3, 3),
            kb=constant("kb", 16),
            w=constant("w", 16, 64),
        ),
        images(4, 16, 8, 8),
        lambda feeds, weights: [
            np.maximum(convolve(feeds["x"], weights["c"], constant("kb", 16), 1, 1, (1, 1)), 0).mean(axis=(2, 3)) @ weights["fc"]
        ],
        {"c": CONVERTED, "fc": CONVERTED},
    ),
    Trap(
        "conv-1d-of-half-precision",
        lambda: model(
            """g (float16[n, 4, 20] x) => (float16[n, 8, 18] y) {
                [c] y = Conv(x, k, b)
            }""",
            k=kernel(8, 4, 3).astype(np.float16),
            b=B.astype(np.float16),
        ),
        images(4, 4, 20, dtype=np.float16),
        lambda feeds, weights: [
            convolve(feeds["x"].astype(np.float32), one(weights["c"]), B.astype(np.float16), 1, 1, (0, 0)).astype(np.float16)
        ],
        {"c": CONVERTED},
    ),
    Trap(
        "conv-3d-bias-behind-identity",
        lambda: model(
            """g (float[n, 2, 6, 6, 6] x) => (float[n, 8, 3, 3, 3] y) {
                i = Identity(b)
                [c] y = Conv<strides = [2, 2, 2]>(x, k, i)
            }""",
            k=kernel(8, 2, 2, 2, 2),
            b=B,
        ),
        images(4, 2, 6, 6, 6),
        lambda feeds, weights: [convolve(feeds["x"], one(weights["c"]), B, 2, 1, (0, 0))],
        {"c": CONVERTED},
    ),
    Trap(
        "conv-transpose",
        lambda: model(
            """g (float[n, 6, 5, 5] x) => (float[n, 8, 10, 10] y) {
                [t] y = ConvTranspose<strides = [2, 2], pads = [1, 1, 0, 0]>(x, k, b)
            }""",
            k=kernel(6, 8, 3, 3),
            b=B,
        ),
        images(4, 6, 5, 5),
        lambda feeds, weights: [spread(feeds["x"], one(weights["t"]), B, 3, 2, (1, 0))],
        {"t": CONVERTED},
    ),
    *(
        Trap(
            f"conv-transpose-groups-{form}",
            lambda: model(
                """g (float[n, 6, 5, 5] x) => (float[n, 8, 10, 10] y) {
                [t] y = ConvTranspose<strides = [2, 2], group = 2>(x, k, b)
            }""",
                k=kernel(6, 4, 2, 2),
                b=B,
            ),
            images(4, 6, 5, 5),
            lambda feeds, weights: [spread(feeds["x"], weights["t"], B, 2, 2, (0, 0))],
            {"t": CONVERTED},
            {"conv_form": form},
        )
        for form in ("fold", "dequantize")
    ),
    Trap(
        "conv-transpose-depthwise",
        lambda: model(
            """g (float[n, 8, 5, 5] x) => (float[n, 8, 10, 10] y) {
                [t] y = ConvTranspose<strides = [2, 2], group = 8>(x, k, b)
            }""",
            k=kernel(8, 1, 2, 2),
            b=B,
        ),
        images(4, 8, 5, 5),
        lambda feeds, weights: [spread(feeds["x"], weights["t"], B, 2, 2, (0, 0))],
        {"t": CONVERTED},
    ),
    Trap(
        "conv-weight-shared",
        lambda: model(
            """g (float[n, 8, 6, 6] x) => (float[n, 8, 6, 6] y) {
                [a] h = Conv<pads = [1, 1, 1, 1]>(x, k, b)
                r = Relu(h)
                [z] y = Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(r, k)
            }""",
            k=kernel(8, 8, 3, 3),
            b=B,
        ),
        images(4, 8, 6, 6),
        lambda feeds, weights: [
            convolve(np.maximum(convolve(feeds["x"], one(weights["a"]), B, 1, 1, (1, 1)), 0), one(weights["z"]), None, 1, 2, (2, 2))
        ],
        {"a": CONVERTED, "z": CONVERTED},
    ),
    Trap(
        "conv-left-alone",
        lambda: model(
            """g (float[n, 8, 6, 6] x, float[8, 8, 1, 1] v) => (float[n, 8, 6, 6] y) {
                q = Constant<value = int8[8, 8, 1, 1] {"""
            + ", ".join(str(i % 15 - 7) for i in range(64))
            + """}>()
                s = Constant<value = float {0.05}>()
                d = DequantizeLinear(q, s)
                [dynamic] a = Conv(x, v)
                [quantized] e = Conv(a, d)
                [fine] y = Conv(e, k)
            }""",
            k=kernel(8, 8, 1, 1),
        ),
        lambda rng: {"x": rng.standard_normal((4, 8, 6, 6), np.float32), "v": rng.standard_normal((8, 8, 1, 1), np.float32) * 0.3},
        lambda feeds, weights: [
            convolve(
                convolve(
                    convolve(feeds["x"], one(feeds["v"].reshape(8, 8).T), None, 1, 1, (0, 0)),
                    one((np.arange(64).reshape(8, 8).T % 15 - 7) * np.float32(0.05)),
                    None,
                    1,
                    1,
                    (0, 0),
                ),
                one(weights["fine"]),
                None,
                1,
                1,
                (0, 0),
            )
        ],
        {
            "dynamic": "weight is computed at run time",
            "quantized": "weight is quantized already",
            "fine": CONVERTED,
        },
    ),
    Trap(
        "conv-before-opset-13",
        lambda: model(
            """g (float[n, 3, 6, 6] x) => (float[n, 8, 4, 4] y) {
                [c] y = Conv(x, k, b)
            }""",
            opset=9,
            ir_version=4,
            k=kernel(8, 3, 3, 3),
            b=B,
        ),
        images(4, 3, 6, 6),
        lambda feeds, weights: [convolve(feeds["x"], one(weights["c"]), B, 1, 1, (0, 0))],
        {"c": CONVERTED},
    ),
    Trap(
        "conv-asked-to-stay-float",
        lambda: model(
            """g (float[n, 3, 6, 6] x) => (float[n, 64] y) {
                [c] h = Conv(x, k, b)
                p = GlobalAveragePool(h)
                f = Flatten(p)
                [fc] y = MatMul(f, w)
            }""",
            k=kernel(8, 3, 3, 3),
            b=B,
            w=constant("w", 8, 64),
        ),
        images(4, 3, 6, 6),
        lambda feeds, weights: [
            convolve(feeds["x"], kernel(8, 3, 3, 3).reshape(8, 27).T[None], B, 1, 1, (0, 0)).mean(axis=(2, 3)) @ weights["fc"]
        ],
        {"c": "convolutions stay float (conv_bits gives them bits)", "fc": CONVERTED},
        {"conv_bits": None},
    ),
)
