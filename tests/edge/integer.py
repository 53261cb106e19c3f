"""Integer models whose exact answer is known: the forms in which products of uint8 and int8 reach a target, and codes for them.

Inputs are chosen so that quantizing them loses nothing: what a target answers is then either the exact sum or a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tests.edge.jobs import Array, Job
from tests.graphs import Builder

ZERO_POINT = np.array(100, np.uint8)
SCALE = np.array(1 / 64, np.float32)


def pair_safe(k: int, n: int, seed: int = 0) -> Array:
    """int8 codes over the whole range, where in each pair (2j, 2j+1) positive codes sum to 128 at most and negative ones to -128 at least.

    Many pairs lie on that boundary: a kernel whose pairs were others, or whose range were one less, would be caught.
    """
    first, second = np.random.default_rng(seed).integers(-128, 128, (2, (k + 1) // 2, n))
    over, under = (first > 0) & (first + second > 128), (first < 0) & (first + second < -128)
    second[over], second[under] = 128 - first[over], -128 - first[under]
    return np.stack([first, second], axis=1).reshape(-1, n)[:k].astype(np.int8)


def unsafe(k: int, n: int, seed: int = 0) -> Array:
    """Codes of which no pair is safe."""
    return np.random.default_rng(seed).integers(100, 128, (k, n)).astype(np.int8)


def high(rows: int, k: int, seed: int = 1) -> Array:
    """Inputs near the top of their range."""
    return np.random.default_rng(seed).integers(200, 256, (rows, k)).astype(np.uint8)


def worst(codes: Array, seed: int = 1) -> Array:
    """The inputs that load accumulators the most (255 on the positive codes of a column, on the negative, on all), and random ones."""
    full = np.full((1, len(codes)), 255)
    rows = [
        np.where(codes.T > 0, 255, 0),
        np.where(codes.T < 0, 255, 0),
        full,
        np.random.default_rng(seed).integers(0, 256, (8, len(codes))),
    ]
    return np.concatenate(rows).astype(np.uint8)


def saturated(x: Array, codes: Array) -> Array:
    """``x @ codes`` as x86 without VNNI computes it: each pair (2j, 2j+1) of products clipped to int16, then summed."""
    odd = len(codes) % 2
    padded_x, padded = np.pad(x.astype(np.int64), ((0, 0), (0, odd))), np.pad(codes.astype(np.int64), ((0, odd), (0, 0)))
    products = padded_x[:, :, None] * padded[None]
    total: Array = np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(axis=1)
    return total


def _typed(value: ir.Value, kind: ir.DataType) -> ir.Value:
    value.dtype = kind
    return value


def _scales(n: int) -> Array:
    """A power of two a column: exact, and not all the same."""
    return np.float32(2.0) ** (np.arange(n) % 3 - 8).astype(np.float32)


def matmul_integer(codes: Array, x: Array, path: Path) -> tuple[Job, Array]:
    """``MatMulInteger`` alone; also for int8 inputs."""
    b = Builder()
    inputs = b.input("x", ["batch", len(codes)], ir.tensor(x).dtype)
    out = _typed(b.node("MatMulInteger", [inputs, b.constant("w", codes)]), ir.DataType.INT32)
    ir.save(b.model(out, ["batch", codes.shape[1]]), path)
    return Job(path, {"x": x}), x.astype(np.int64) @ codes.astype(np.int64)


def static_qdq(codes: Array, x: Array, path: Path) -> tuple[Job, Array]:
    """QuantizeLinear (uint8) -> DequantizeLinear -> MatMul <- DequantizeLinear (int8, a scale a column)."""
    b = Builder()
    n = codes.shape[1]
    grid = [b.constant("x_scale", SCALE), b.constant("x_zero", ZERO_POINT)]
    x_codes = _typed(b.node("QuantizeLinear", [b.input("x", ["batch", len(codes)]), *grid]), ir.DataType.UINT8)
    rounded = _typed(b.node("DequantizeLinear", [x_codes, *grid]), ir.DataType.FLOAT)
    stored: list[ir.Value | None] = [b.constant("w", codes), b.constant("w_scale", _scales(n)), b.constant("w_zero", np.zeros(n, np.int8))]
    weight = _typed(b.node("DequantizeLinear", stored, axis=1), ir.DataType.FLOAT)
    out = b.node("MatMul", [rounded, weight])
    ir.save(b.model(out, ["batch", n]), path)
    centred = x.astype(np.int64) - int(ZERO_POINT)
    return Job(path, {"x": centred.astype(np.float32) * SCALE}), centred @ codes.astype(np.int64) * (SCALE * _scales(n))


def dynamic(codes: Array, x: Array, path: Path) -> tuple[Job, Array]:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul with both scales, which onnxruntime fuses.

    A row that holds 0 and 255 is added where they do not occur, so that the scale comes out as 1 and nothing is lost.
    """
    b = Builder()
    n = codes.shape[1]
    if (x.min(), x.max()) != (0, 255):
        x = np.concatenate([x, np.resize(np.array([0, 255], np.uint8), (1, len(codes)))])
    quantize = ir.node("DynamicQuantizeLinear", [b.input("x", ["batch", len(codes)])], num_outputs=3, name="quantize")
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for value, name, kind in zip(quantize.outputs, ("x_codes", "x_scale", "x_zero"), kinds, strict=True):
        value.name, value.dtype = name, kind
    b.nodes.append(quantize)
    x_codes, x_scale, x_zero = quantize.outputs
    factors: list[ir.Value | None] = [x_codes, b.constant("w", codes), x_zero, b.constant("w_zero", np.zeros(n, np.int8))]
    product = _typed(b.node("MatMulInteger", factors), ir.DataType.INT32)
    as_float = _typed(b.node("Cast", [product], to=ir.DataType.FLOAT), ir.DataType.FLOAT)
    out = b.node("Mul", [as_float, b.node("Mul", [x_scale, b.constant("w_scale", _scales(n))], "scales")])
    ir.save(b.model(out, ["batch", n]), path)
    centred = x.astype(np.int64) - int(ZERO_POINT)
    return Job(path, {"x": centred.astype(np.float32)}), centred @ codes.astype(np.int64) * _scales(n)


FORMS: dict[str, Callable[[Array, Array, Path], tuple[Job, Array]]] = {
    "matmul-integer": matmul_integer,
    "static-qdq": static_qdq,
    "dynamic": dynamic,
}
