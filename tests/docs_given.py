"""Files that pages of the documentation start from: ``<!-- given: model.onnx inputs.npz -->``.

One function a file (or folder), made once a session and copied to the folder that a page runs in. To add one: a function of the path to
write, and its line in `GIVEN`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

import magr_onnx
from tests import decoders, graphs
from tests.graphs import Array, Builder, random

WIDTH, INNER = 128, 256


def model(path: Path) -> None:
    """Two feed-forward layers between norms and a head: small, of the kinds of layers transformers have. Input ``x (batch, time, 128)``."""
    b = Builder()
    x = b.input("x", ["batch", "time", WIDTH])
    scale = b.constant("norm_scale", np.ones(WIDTH, np.float32))
    normal = b.node("LayerNormalization", [x, scale, b.constant("norm_bias", np.zeros(WIDTH, np.float32))], "norm")
    up = b.node("Add", [b.node("MatMul", [normal, b.constant("up", random(WIDTH, INNER))], "up"), b.constant("up_bias", random(INNER))])
    down = b.node("MatMul", [b.node("Gelu", [up]), b.constant("down", random(INNER, WIDTH, seed=1))], "down")
    head = b.node("MatMul", [b.node("Add", [down, x]), b.constant("head", random(WIDTH, 64, seed=2))], "head")
    path.write_bytes(graphs.proto(b.model(head, ["batch", "time", 64])).SerializeToString())


def _samples(count: int, seed: int) -> dict[str, Array]:
    rows = graphs.correlated(count * 8, WIDTH, seed)
    return {"x": rows.reshape(count, 8, WIDTH)}


def inputs(path: Path) -> None:
    """Calibration data: 64 samples of 8 rows."""
    np.savez(path, **_samples(64, 0))  # type: ignore[arg-type]


def heldout(path: Path) -> None:
    """Data that nothing is fitted to."""
    np.savez(path, **_samples(16, 1))  # type: ignore[arg-type]


def labels(path: Path) -> None:
    """The class that the float model gives to every row of ``heldout.npz``."""
    session = ort.InferenceSession(put(["model.onnx"], path.parent) / "model.onnx")
    np.save(path, session.run(None, _samples(16, 1))[0].argmax(-1))


def batches(path: Path) -> None:
    """A folder of calibration batches."""
    path.mkdir()
    for i in range(4):
        np.savez(path / f"{i:03}.npz", **_samples(16, i))  # type: ignore[arg-type]


def model_int4(path: Path) -> None:
    """``model.onnx`` at 4 bits, as the command line makes it by default."""
    _quantized(path)


def model_int8(path: Path) -> None:
    """``model.onnx`` with 8-bit integers, for x86 without VNNI."""
    _quantized(path, format="qdq-int8", target="x86-avx2")


def report_json(path: Path) -> None:
    """The report of ``model.int4.onnx``, as ``--report`` writes it."""
    path.write_text(_quantized(path.with_suffix(".tmp.onnx")).report.to_json())
    path.with_suffix(".tmp.onnx").unlink()


def decoder(path: Path) -> None:
    """A small decoder as onnxruntime-genai's builder writes it: 2 layers, 96 tokens, random weights."""
    path.write_bytes(ir.to_proto(decoders.genai()).SerializeToString())


def decoder_folder(path: Path) -> None:
    """The folder such a model comes in."""
    path.mkdir()
    decoder(path / "model.onnx")
    decoders.tokenizer(path / "tokenizer.json")
    (path / "genai_config.json").write_text('{"model": {"type": "llama"}}')


def text(path: Path) -> None:
    """16 lines that the tokenizer of the decoder knows."""
    path.write_text("".join(" ".join(f"w{i}" for i in ids) + "\n" for ids in decoders.tokens()))


def _quantized(path: Path, **options: object) -> magr_onnx.Optimized:
    source, data = (put([name], path.parent) / name for name in ("model.onnx", "inputs.npz"))
    return magr_onnx.optimize(source, calibration=data, output=path, **options)  # type: ignore[arg-type]


def minilm_onnx(path: Path) -> None:
    """A folder as ``optimum-cli export onnx`` leaves it, of a tiny encoder with random weights."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.optimum_export", "sentences", str(path)]
    subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, env=environment, capture_output=True, check=True)


def sentences(path: Path) -> None:
    """48 lines of text."""
    words = ["a", "sentence", "that", "nobody", "has", "seen", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(48)))


GIVEN: dict[str, Callable[[Path], object]] = {
    "model.onnx": model,
    "inputs.npz": inputs,
    "heldout.npz": heldout,
    "labels.npy": labels,
    "batches": batches,
    "model.int4.onnx": model_int4,
    "model.int8.onnx": model_int8,
    "report.json": report_json,
    "minilm-onnx": minilm_onnx,
    "sentences.txt": sentences,
    "decoder.onnx": decoder,
    "decoder": decoder_folder,
    "text.txt": text,
}


def put(names: Sequence[str], made: Path) -> Path:
    """Make the files that are not in the folder ``made`` yet; returns the folder."""
    for name in names:
        if not (made / name).exists():
            GIVEN[name](made / name)
    return made


def give(names: Sequence[str], made: Path, folder: Path) -> None:
    """Copy files, made once in the folder ``made``, to ``folder``."""
    for name in names:
        source = put([name], made) / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)
