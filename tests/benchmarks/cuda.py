"""onnxruntime's CUDA kernels on the files we emit: right, and how fast.

    python tests/benchmarks/cuda.py [--json FILE] [--quick]

Needs onnxruntime-gpu and a GPU. Four parts:

1. One layer in every format, grid and type, CUDA against a NumPy evaluation of the codes read from the file.
2. The bundled language model optimized with calibration on the CPU and on the GPU: time, and the held-out perplexity of both files on both.
3. Calibration of a stack of wide layers, CPU against GPU.
4. One row through a wide layer, as in decoding: half precision against 4 and 8 bits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from common import header, interleaved, progress, table, write_json

import magr_onnx
from magr_onnx.errors import MagrError
from magr_onnx.models import bundled
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.helpers import emitted_weight

TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": None}
ROWS = (1, 3, 64)


def layer(k: int, n: int, kind: str, depth: int = 1) -> onnx.ModelProto:
    """``depth`` layers ``(k, n), (n, k)...`` with biases and ReLUs; inputs and outputs are float, what is between is of ``kind``."""
    body, tensors, value, widths = [f"c0 = Cast<to = {onnx.TensorProto.DataType.Value(kind.upper())}>(x)"], {}, "c0", (k, n)
    for i in range(depth):
        a, b = widths[i % 2], widths[(i + 1) % 2]
        tensors |= {f"w{i}": constant(f"w{i}", a, b), f"b{i}": constant(f"b{i}", b)}
        body += [f"[fc{i}] h{i} = MatMul({value}, w{i})", f"a{i} = Add(h{i}, b{i})"]
        value = f"a{i}"
        if i + 1 < depth:
            body.append(f"r{i} = Relu({value})")
            value = f"r{i}"
    proto = model(
        f"g (float[m, {k}] x) => (float[m, {widths[depth % 2]}] y) {{\n" + "\n".join(body) + f"\ny = Cast<to = 1>({value})\n}}", opset=21
    )
    proto.ir_version = 10
    for name, array in tensors.items():
        tensor = ir.tensor(array if TYPES[kind] is not None else array.astype(ir.DataType.BFLOAT16.numpy()), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor if TYPES[kind] is None else ir.tensor(array.astype(TYPES[kind]), name=name)))
    return proto


def settings(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Formats with every grid the CUDA provider should run."""
    blocks = (32, 128, None) if quick else (16, 32, 64, 128, 256, None)
    for bits, block, symmetric in itertools.product((4, 8), blocks, (False, True)):
        grid = {"bits": bits, "block_size": block, "symmetric": symmetric}
        yield "matmulnbits", grid
        yield "qdq", grid
    yield "dynamic-int8", {}
    yield "qdq-int8", {}


def kernels(quick: bool) -> list[dict[str, Any]]:
    """Part 1: a row a format and type."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    for kind, (k, n) in itertools.product(TYPES, ((256, 64), (264, 63))):
        source = layer(k, n, kind)
        data = [{"x": rng.standard_normal((64, k), np.float32)} for _ in range(4)]
        for name, options in settings(quick):
            row = rows.setdefault((name, kind), {"format": name, "type": kind, "files": 0, "refused": 0, "error": 0.0, "failed": []})
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "q.onnx")
                what = f"{k}x{n} {options}"
                try:
                    report = magr_onnx.optimize(
                        source,
                        data if name == "qdq-int8" else None,
                        output=path,
                        format=name,
                        bias="none",
                        quantizer="rtn",
                        provider="cuda",
                        **options,
                    ).report
                except MagrError as error:
                    row["refused"] += 1
                    row["failed"].append(f"{what}: refused: {str(error)[:160]}")
                    continue
                row["files"] += 1
                nodes = {node.name: node for node in ir.load(path).graph.all_nodes()}
                weight = emitted_weight(nodes[report.layers[0].emitted])
                try:
                    with Session(path, "cuda") as session:
                        for m in ROWS:
                            x = rng.standard_normal((m, k), np.float32)
                            got = session.run({"x": x})[0]
                            wanted = x @ weight + constant("b0", n)
                            error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
                            row["error"] = max(row["error"], error)
                            if error > 0.03 or not np.isfinite(error):
                                row["failed"].append(f"{what}: {m} rows are off by {error:.3g}")
                except MagrError as error:
                    row["failed"].append(f"{what}: {str(error)[:200]}")
    return list(rows.values())


def language_model(folder: Path) -> list[dict[str, Any]]:
    """Part 2: a row a place of calibration and effort."""
    rows = []
    for effort, provider in itertools.product(("fast", "balanced"), ("cpu", "cuda")):
        path = folder / f"{effort}-{provider}.onnx"
        begin = time.perf_counter()
        magr_onnx.optimize(bundled.MODEL, bundled.CALIBRATION, output=path, effort=effort, provider=provider)
        row: dict[str, Any] = {"effort": effort, "calibrated on": provider, "seconds": time.perf_counter() - begin}
        for where in ("cpu", "cuda"):
            checked = magr_onnx.validate(
                bundled.MODEL, path, bundled.HELD_OUT, provider=where, arithmetics=[Arithmetic.DEFAULT], layers=False, latency=False
            )
            output = checked.arithmetics[Arithmetic.DEFAULT][0]
            row[f"KL on {where}"], row[f"SQNR dB on {where}"] = output.kl, output.sqnr_db
        rows.append(row)
    return rows


def calibration(quick: bool) -> list[dict[str, Any]]:
    """Part 3: a row a provider."""
    source = layer(1024, 4096, "float", depth=4 if quick else 8)
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2048, 1024), np.float32)} for _ in range(8)]
    rows = []
    for effort, provider in itertools.product(("fast", "balanced"), ("cpu", "cuda")):
        report = magr_onnx.optimize(source, data, effort=effort, provider=provider).report
        rows.append({"effort": effort, "provider": provider, **{k: round(v, 2) for k, v in report.seconds.items()}})
    return rows


def decoding(folder: Path, k: int = 4096, n: int = 11008) -> list[dict[str, Any]]:
    """Part 4: a row a file."""
    source = layer(k, n, "float16", depth=2)
    paths = {"float16": folder / "float16.onnx"}
    onnx.save(source, paths["float16"])
    for bits, block in ((4, 32), (4, 128), (8, 128)):
        paths[f"{bits} bits, block {block}"] = path = folder / f"{bits}-{block}.onnx"
        magr_onnx.optimize(source, output=path, bits=bits, block_size=block, quantizer="rtn", provider="cuda")
    sessions = {name: Session(path, "cuda") for name, path in paths.items()}
    rows = []
    for m in (1, 256):
        x = {"x": np.random.default_rng(0).standard_normal((m, k), np.float32)}
        seconds = interleaved([functools.partial(session.run, x) for session in sessions.values()], 30, warmup=5)
        base = statistics.median(seconds[0])
        for (name, path), taken in zip(paths.items(), seconds, strict=True):
            middle = statistics.median(taken)
            rows.append({"file": name, "rows": m, "MB": path.stat().st_size / 1e6, "ms": 1000 * middle, "ratio": middle / base})
    for session in sessions.values():
        session.close()
    return rows


def show(rows: list[dict[str, Any]], skip: tuple[str, ...] = ()) -> None:
    names = [n for n in dict.fromkeys(key for row in rows for key in row) if n not in skip]
    print(table(names, [[f"{v:.4g}" if isinstance(v := row.get(n), float) else v for n in names] for row in rows]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything measured to a file")
    parser.add_argument("--quick", action="store_true", help="fewer grids and layers")
    args = parser.parse_args()
    print(header("onnxruntime's CUDA provider on emitted files"))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, part in (
            ("kernels against the codes", lambda: kernels(args.quick)),
            ("bundled model", lambda: language_model(folder)),
            ("calibration of wide layers, seconds", lambda: calibration(args.quick)),
            ("one row and 256 rows through two wide layers", lambda: decoding(folder)),
        ):
            progress(title)
            print(f"\n## {title}\n")
            results[title] = rows = part()
            show([{**r, "failed": len(r["failed"])} if "failed" in r else r for r in rows])
            for failure in dict.fromkeys(f"- {r['format']} {r['type']}: {f}" for r in rows for f in r.get("failed", [])):
                print(failure, flush=True)
            write_json(args.json, results)


if __name__ == "__main__":
    main()
