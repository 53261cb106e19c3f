"""Layers, weights and oracles for the numeric tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from hypothesis import settings

from magr_onnx.core import error_feedback
from magr_onnx.core.grid import choose
from magr_onnx.core.quantizers import gptq
from magr_onnx.core.types import LayerStats, QuantizedWeight, TargetMoments, WeightSpec
from magr_onnx.model_io.writing import Layout
from magr_onnx.models import bundled
from magr_onnx.passes.emit.readback import readers_of
from magr_onnx.passes.layers.selection import ALL
from magr_onnx.workflow.context import Memory, RunContext

Array = npt.NDArray[Any]

PATIENCE = 600
"""Seconds to wait for what comes in a moment where the machine is idle: no test is to fail because it is busy."""

ROOT = Path(__file__).resolve().parents[1]
"""The root of the project."""

EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True, database=None)


SPECS = [
    WeightSpec(2, 32),
    WeightSpec(3, None),
    WeightSpec(4, 20),
    WeightSpec(4, None, symmetric=True),
    WeightSpec(4, 32, True, scale_dtype="float16"),
]
"""Grids of every kind: blocks that end short or not, channels, a fixed zero point, scales in half precision."""


def run_program(name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a module of ``tests`` in a process of its own; the JSON object that is its last line."""
    command = [sys.executable, "-m", f"tests.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def emitted_weight(node: ir.Node) -> Array | None:
    """The dequantized weight ``(K, N)`` of a node, as a read-back finds it; None if no format has its form."""
    return next((weight for reader in readers_of(node) if (weight := reader.weight(node)) is not None), None)


def activations(rows: int, k: int, seed: int = 0, tail: float = 1.0) -> Array:
    """Correlated inputs ``(rows, k)`` with a nonzero mean; ``tail`` spreads their power over orders of magnitude."""
    rng = np.random.default_rng(seed)
    factors = max(1, k // 4)
    shared = rng.standard_normal((rows, factors)) @ rng.standard_normal((factors, k)) / np.sqrt(factors)
    x: Array = (shared + 0.3 * rng.standard_normal((rows, k)) + 0.5 * rng.standard_normal(k)) * np.exp(tail * rng.standard_normal(k))
    return x


def gram_of(x: Array) -> Array:
    product: Array = x.T @ x / len(x)
    return product


def layer(k: int, n: int, seed: int = 0, tail: float = 1.0) -> tuple[Array, Array]:
    """Heavy-tailed weights ``(k, n)`` float32 and the Gram matrix ``(k, k)`` float64 of correlated inputs."""
    weights = np.random.default_rng(seed + 1000).standard_t(4, (k, n)) * 0.05
    return weights.astype(np.float32), gram_of(activations(4 * k, k, seed, tail))


def few_samples(source: Path = bundled.CALIBRATION) -> list[dict[str, Array]]:
    """Data of the bundled model: as little as a test of anything but accuracy needs."""
    ids = np.load(source)["input_ids"]
    return [{"input_ids": ids[at : at + 16]} for at in (0, 16)]


def run_context() -> RunContext:
    """A run on the CPU with memory for everything, of all layers, that nobody watches."""
    memory = Memory(False, 1 << 30, 1 << 30, Layout())
    return RunContext("cpu", ALL, None, memory, lambda stage, done, total: None, None)


def next_token_nats(logits: Array, ids: Array, real: Array | None = None) -> list[float]:
    """Next-token cross-entropies (nats) by the definition, one prediction after the other.

    Args:
        logits: ``(B, T, V)``; those at one position are for the token at the next.
        ids: Tokens ``(B, T)``.
        real: What is no padding ``(B, T)``: nothing is predicted from padding, and padding is not to be predicted. All, without it.
    """
    nats = []
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if real is None or (real[b, t] and real[b, t + 1]):
                scores = logits[b, t].astype(np.float64)
                top = scores.max()
                probability = np.exp(scores[ids[b, t + 1]] - top) / np.exp(scores - top).sum()
                nats.append(-float(np.log(probability)))
    return nats


def gptq_quantized(
    weights: Array, gram: Array, spec: WeightSpec, *, beta: float | None = None, damping: float = 0.1, act_order: bool = True
) -> QuantizedWeight:
    """``weights (K, N)`` by GPTQ under ``gram (K, K)``; ``beta`` as in `magr_onnx.core.grid.choose`."""
    return gptq.solve(weights, gptq.prepare(gram, damping, act_order), choose(weights, spec, gram.diagonal(), beta))


def random_quantized(k: int, n: int, spec: WeightSpec, seed: int = 0) -> QuantizedWeight:
    """Uniform codes on a random grid."""
    rng = np.random.default_rng(seed)
    shape = (spec.groups(k), n)
    zeros = np.full(shape, spec.middle) if spec.symmetric else rng.integers(0, spec.top + 1, shape)
    scales = rng.uniform(1e-3, 0.1, shape).astype(spec.scale_dtype).astype(np.float32)
    return QuantizedWeight(rng.integers(0, spec.top + 1, (k, n)).astype(np.uint8), scales, zeros.astype(np.uint8), spec)


def project_by_sorting(columns: Array, radius: float) -> Array:
    """Projection of every column on the l1 ball, by sorting (Duchi et al. 2008)."""
    magnitude = np.abs(columns)
    descending = -np.sort(-magnitude, axis=0)
    theta = (np.cumsum(descending, axis=0) - radius) / np.arange(1, len(columns) + 1)[:, None]
    last = (descending > theta).sum(axis=0) - 1
    cut = np.maximum(np.take_along_axis(theta, last[None], axis=0), 0)
    projected: Array = np.sign(columns) * np.maximum(magnitude - cut, 0)
    return projected


def target_error(weight: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> float:
    """``||X_q W_hat - Y||^2 / ||Y||^2`` over the rows of ``stats``, without the mean error if ``centred``."""
    return error_feedback.squared_error(weight, stats, target, centred) / float(target.power.sum())
