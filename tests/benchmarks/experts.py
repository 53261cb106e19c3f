"""What calibration, the router and few tokens mean for random experts at 4 bits, and what QMoE takes of the time of MoE.

``python tests/benchmarks/experts.py [--seeds N]`` prints tables; every figure is the SQNR of the output on fresh tokens, in dB.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from common import interleaved

import magr_onnx
from magr_onnx.models.zoo.trap import model
from magr_onnx.runtime.calibration import expert_tokens
from magr_onnx.runtime.ort.session import Session

Array = np.ndarray[Any, Any]
E, H, UNITS, SAMPLE = 8, 64, 96, 16


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def experts(rng: np.random.Generator, router: Array, k: int, width: int = H, units: int = UNITS) -> onnx.ModelProto:
    text = f"""g (float[n, {width}] x) => (float[n, {width}] y) {{
        [router] scores = MatMul(x, r)
        [moe] y = com.microsoft.MoE<k = {k}, activation_type = "swiglu", swiglu_fusion = 1, normalize_routing_weights = 1>
            (x, scores, w1, , w2)
    }}"""
    weights = {"w1": normal(rng, E, 2 * units, width), "w2": normal(rng, E, width, units)}
    return model(text, domains=("com.microsoft",), r=router.astype(np.float32), **weights)


class OneKind:
    """Inputs of all experts are alike: two of eight see a token, by chance."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.mixed = rng.standard_normal((H // 4, H)) / 4
        self.router = rng.standard_normal((H, E)) / np.sqrt(H)
        self.model = experts(rng, self.router, 2)

    def tokens(self, seed: int, count: int, to: set[int]) -> Array:
        """Tokens that go to no other experts."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((60 * count, H // 4)) @ self.mixed + 0.3 * rng.standard_normal((60 * count, H))
        fitting = np.isin(np.argsort(-(x @ self.router), axis=1)[:, :2], list(to)).all(1)
        return x[fitting][:count].astype(np.float32)


class OwnKinds:
    """Inputs of every expert have a mean and directions of their own, and its router knows them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.centres = normal(rng, E, H)
        self.mixed = rng.standard_normal((E, 12, H)) / np.sqrt(12)
        self.model = experts(rng, 3 * self.centres.T, 1)

    def tokens(self, seed: int, count: int, to: set[int]) -> Array:
        rng = np.random.default_rng(seed)
        kind = rng.choice(sorted(to), count)
        own = np.einsum("nk,nkh->nh", rng.standard_normal((count, 12)), self.mixed[kind])
        return (4 * self.centres[kind] + own + 0.1 * rng.standard_normal((count, H))).astype(np.float32)


def decibels(source: onnx.ModelProto, calibration: Array | None, held_out: Array, **options: Any) -> float:
    data = None if calibration is None else [{"x": part} for part in np.split(calibration, len(calibration) // SAMPLE)]
    result = magr_onnx.optimize(source, data, progress=False, accuracy_level=0, **options).model
    outputs = []
    for each in (ir.from_proto(source), result):
        with Session(each) as session:
            outputs.append(np.asarray(session.run({"x": held_out})[0], np.float64))
    return float(10 * np.log10((outputs[0] ** 2).sum() / ((outputs[1] - outputs[0]) ** 2).sum()))


def cases(seed: int) -> Iterator[tuple[str, float]]:
    """Yield what is measured, and the figure."""
    every, seen = set(range(E)), set(range(E - 3))
    for kind in (OneKind(seed), OwnKinds(seed)):
        name = type(kind).__name__
        many, held_out = kind.tokens(1, 1024, every), kind.tokens(2, 1024, every)
        yield f"{name}: data-free", decibels(kind.model, None, held_out)
        yield f"{name}: rtn, 1,024 tokens", decibels(kind.model, many, held_out, quantizer="rtn")
        yield f"{name}: gptq, 1,024 tokens", decibels(kind.model, many, held_out, quantizer="gptq")
        yield f"{name}: auto, 1,024 tokens", decibels(kind.model, many, held_out)
        yield f"{name}: auto, 1,024 tokens, router too", decibels(kind.model, many, held_out, include=["*"])
        rare = kind.tokens(3, 64, every - seen)
        for few in (0, 3, 15):
            calibration = np.concatenate([kind.tokens(1, 512 - few, seen), rare[:few]])
            for joining in (0, 64):
                expert_tokens.FEW = joining
                text = f"{name}: three experts with {few} of 512 tokens, nearest ones {'join' if joining else 'left out'}"
                yield text, decibels(kind.model, calibration, kind.tokens(4, 512, every - seen))
            expert_tokens.FEW = 64


def times() -> Iterator[tuple[str, float]]:
    """Yield the time of QMoE over that of MoE, one thread."""
    rng, width, units = np.random.default_rng(0), 1024, 1024
    source = experts(rng, normal(rng, width, E), 2, width, units)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float": Path(folder) / "float.onnx"}
        onnx.save(source, paths["float"])
        runs = [(4, 32, 0), (4, 32, 4), (4, None, 0), (8, 32, 0), (8, None, 0)]
        for bits, block, level in runs:
            path = paths.setdefault(f"{bits} bits, block {block}, accuracy level {level}", Path(folder) / f"{bits}-{block}-{level}.onnx")
            options: dict[str, Any] = {"bits": bits, "block_size": block, "accuracy_level": level, "quantizer": "rtn"}
            magr_onnx.optimize(paths["float"], output=path, progress=False, **options)
        for rows in (1, 256):
            x = {"x": rng.standard_normal((rows, width)).astype(np.float32)}
            with contextlib.ExitStack() as stack:
                sessions = [stack.enter_context(Session(path, threads=1)) for path in paths.values()]
                every = interleaved([partial(session.run, x) for session in sessions], 30 if rows == 1 else 5)
            taken = dict(zip(paths, map(statistics.median, every), strict=True))
            yield from ((f"{rows} tokens, {name}", taken[name] / taken["float"]) for name in taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    found: dict[str, list[float]] = {}
    for seed in range(parser.parse_args().seeds):
        for name, value in cases(seed):
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        print(f"{statistics.mean(values):6.2f} dB ({', '.join(f'{v:.2f}' for v in values)})  {name}")
    for name, ratio in times():
        print(f"{ratio:6.2f} of float's time  {name}")


if __name__ == "__main__":
    main()
