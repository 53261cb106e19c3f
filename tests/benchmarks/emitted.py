"""Size and latency of the files we emit, against those of onnxruntime's own quantizer.

    python tests/benchmarks/emitted.py --data DATA --work WORK [--settings 4,2] [--batches 1,16] [--runs 100]

all-MiniLM-L6-v2 at 4 and 2 bits, block 32, asymmetric: our default pipeline and onnxruntime's round to nearest, both as MatMulNBits
nodes, on random tokens. The two sessions take turns run by run, and swap who goes first; a ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Cell, Feeds, header, interleaved, matmulnbits, minilm, ort_quantize, progress, table, write_json

import magr_onnx
from magr_onnx.runtime.ort.session import Session

BLOCK = 32
VOCABULARY = 30_000
COLUMNS = ("bits", "batch", "layers", "MB ours", "MB onnxruntime", "size ratio", "ms float", "ms ours", "ms onnxruntime", "latency ratio")


def feeds(batch: int, length: int, seed: int = 0) -> Feeds:
    """Random tokens, none masked."""
    ids = np.random.default_rng(seed).integers(1000, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def runner(session: Session, batch: Feeds) -> Callable[[], object]:
    return lambda: session.run(batch)


def measure(folder: Path, work: Path, bits: int, batches: list[int], length: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """One row a batch size."""
    model, calibration = folder / "model.onnx", folder / "calibration.npz"
    ours, theirs = work / f"emitted_{bits}_ours.onnx", work / f"emitted_{bits}_onnxruntime.onnx"
    progress(f"{bits} bits: quantizing")
    magr_onnx.optimize(model, calibration, output=ours, bits=bits, block_size=BLOCK)
    ort_quantize("default", model, calibration, theirs, bits, BLOCK)
    rows = []
    with Session(model, threads=threads) as a, Session(ours, threads=threads) as b, Session(theirs, threads=threads) as c:
        for batch in batches:
            progress(f"{bits} bits, batch {batch}: {runs} runs of each")
            inputs = feeds(batch, length)
            seconds = interleaved([runner(s, inputs) for s in (a, b, c)], runs, warmup=5)
            float_ms, ours_ms, theirs_ms = (1000 * statistics.median(s) for s in seconds)
            rows.append(
                {
                    "bits": bits,
                    "batch": batch,
                    "layers_ours": len(matmulnbits(ours)),
                    "layers_onnxruntime": len(matmulnbits(theirs)),
                    "bytes_ours": ours.stat().st_size,
                    "bytes_onnxruntime": theirs.stat().st_size,
                    "float_ms": float_ms,
                    "ours_ms": ours_ms,
                    "onnxruntime_ms": theirs_ms,
                    "latency_ratio": statistics.median(x / y for x, y in zip(seconds[1], seconds[2], strict=True)),
                }
            )
    for path in (ours, theirs):
        path.unlink()
    return rows


def cells(row: dict[str, Any]) -> list[Cell]:
    a, b = row["layers_ours"], row["layers_onnxruntime"]
    return [
        row["bits"],
        row["batch"],
        a if a == b else f"{a} / {b}",
        f"{row['bytes_ours'] / 1e6:.2f}",
        f"{row['bytes_onnxruntime'] / 1e6:.2f}",
        f"{row['bytes_ours'] / row['bytes_onnxruntime']:.4f}",
        f"{row['float_ms']:.2f}",
        f"{row['ours_ms']:.2f}",
        f"{row['onnxruntime_ms']:.2f}",
        f"{row['latency_ratio']:.3f}",
    ]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books and stsb, to export and calibrate the encoder with")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported encoder and temporary files")
    parser.add_argument("--settings", type=numbers, default="4,2", help="bits, comma-separated (default 4,2)")
    parser.add_argument("--batches", type=numbers, default="1,16", help="batch sizes, comma-separated (default 1,16)")
    parser.add_argument("--length", type=int, default=32, help="tokens a sentence (default 32)")
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each file at each batch size (default 100)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads a session (default 1: waiting threads of one session disturb another; 0: all)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    print(header("Emitted files: size and latency"))
    folder = minilm(args.data, args.work)
    rows = [row for bits in args.settings for row in measure(folder, args.work, bits, args.batches, args.length, args.runs, args.threads)]
    print(table(COLUMNS, [cells(row) for row in rows]))
    print(
        f"\nMilliseconds: median of {args.runs} interleaved runs, {args.length} tokens a sentence, {args.threads or 'default'} thread(s)."
    )
    print("Ratios: ours / onnxruntime's, of latency the median over rounds.")
    write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
