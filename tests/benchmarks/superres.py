"""The tables of docs/benchmarks.md on ranges of activations in networks that enlarge photographs, without batch normalization.

    python tests/benchmarks/superres.py --work WORK [--models espcn,edsr] [--waifu2x upconv7.npz]

``espcn`` (four convolutions, PixelShuffle) and ``edsr`` (four residual blocks of two convolutions, PixelShuffle) are trained on crops of
photographs (`photographs`) in some minutes, on first use. With ``--waifu2x`` also the network of six convolutions and a transposed one,
with the weights of ``waifu2x/models/upconv7/anime_style_scale_rgb.npz`` in the package waifu2x. Crops of other parts of the photographs,
reduced by the mean of 2 x 2 pixels, calibrate (32) and judge (32).

Files in 8 bits (weights rounded to nearest, so that ranges alone differ): SQNR of the outputs against the float model, and PSNR against
the crop before it was reduced. Fewer bits, which no format has for activations: SQNR of the float model with its activations rounded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Cell, Unsupported, header, ort_static, progress, quiet, table
from photographs import crops
from torch import nn
from torch.nn import functional as F
from trained import Array, export

import magr_onnx
from magr_onnx.core.activation_ranges import METHODS
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.measure.rounding import output_errors
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import rounded_activations

SIDE, SAMPLES, STEPS, BATCH = 64, 32, 1500, 8
BITS = (8, 6, 5, 4)
STATIC = ("MinMax", "Entropy", "Percentile")


def pairs(count: int, seed: int) -> tuple[Array, Array]:
    """Crops ``(n, 3, 64, 64)`` of 0 to 1, and before them what is left of each in half the size."""
    large = crops(count, (SIDE, SIDE), seed)[0] / np.float32(255)
    return large.reshape(count, 3, SIDE // 2, 2, SIDE // 2, 2).mean(axis=(3, 5)), large


class Enlarged(nn.Module):
    """What a network adds to the image enlarged by interpolation."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        return self.body(x) + F.interpolate(x, scale_factor=2.0, mode="nearest")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


def make_espcn() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return Enlarged(nn.Sequential(*layers, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2)))


def make_edsr() -> nn.Module:
    blocks = [Block(20) for _ in range(4)]
    return Enlarged(nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), *blocks, nn.Conv2d(20, 12, 3, padding=1), nn.PixelShuffle(2)))


class UpConv7(nn.Module):
    """Six convolutions of waifu2x and a transposed one, without padding; its image is padded by seven pixels, as its program does."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        with np.load(weights) as file:
            values = {name: torch.from_numpy(file[name]) for name in file.files}
        names = [f"conv{i}" for i in range(1, 7)]
        self.layers = nn.ModuleList()
        for name in names:
            w = values[f"{name}/W"]
            layer = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2])
            layer.weight.data, layer.bias.data = w, values[f"{name}/b"]
            self.layers.append(layer)
        w = values["conv7/W"]
        self.last = nn.ConvTranspose2d(w.shape[0], w.shape[1], w.shape[2], 2, 3, bias=False)
        self.last.weight.data = w

    def forward(self, x: Any) -> Any:
        x = F.pad(x, (7, 7, 7, 7), mode="replicate")
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
        return self.last(x)


NETWORKS = {"espcn": make_espcn, "edsr": make_edsr}


def made(name: str, work: Path, waifu2x: Path | None) -> Path:
    """The model, trained on first use."""
    path = work / name / "model.onnx"
    if path.is_file():
        return path
    torch.manual_seed(0)
    if name == "waifu2x":
        assert waifu2x is not None
        network: nn.Module = UpConv7(waifu2x)
    else:
        network, (small, large) = NETWORKS[name](), (torch.from_numpy(a) for a in pairs(3000, 0))
        adam = torch.optim.Adam(network.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, STEPS)
        for step in range(STEPS):
            pick = torch.randint(0, len(small), (BATCH,))
            loss = F.l1_loss(network(small[pick]), large[pick])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            if step % 500 == 0:
                progress(f"{name}, step {step}: {loss.item():.4f}")
    export(network.eval(), [torch.zeros(2, 3, SIDE // 2, SIDE // 2)], ("images",), path)
    return path


def outputs(model: Any, images: Array) -> Array:
    with Session(model) as session:
        return np.concatenate([session.run({"images": images[at : at + 8]})[0] for at in range(0, len(images), 8)]).astype(np.float64)


def decibels(signal: Any, noise: Array) -> float:
    """Of energies; of a peak of 1 if ``signal`` is that."""
    return float(10 * np.log10(np.mean(np.square(signal)) / np.square(noise).mean()))


def files(source: Path, work: Path, calibration: Array) -> Iterator[tuple[str, Any]]:
    """Models to judge, by name."""
    yield "float", source
    for ranges in METHODS:
        for equalize in (False, True):
            options: dict[str, Any] = {"format": "qdq-int8", "prefer": "size", "quantizer": "rtn", "alpha": 0, "feedback": False}
            with quiet():
                made = magr_onnx.optimize(
                    source, {"images": calibration}, activation_range=ranges, equalize=equalize, progress=False, **options
                ).model
            yield f"{ranges}{', equalized' if equalize else ''}", made
    np.savez(work / "calibration.npz", images=calibration)
    for ranges in STATIC:
        from onnxruntime.quantization import CalibrationMethod, QuantType

        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        path = work / "static.onnx"
        try:
            ort_static(source, work / "calibration.npz", path, calibrate_method=getattr(CalibrationMethod, ranges), **types)
            yield f"quantize_static, {ranges}", path
        except Unsupported as error:
            progress(f"quantize_static, {ranges}: {error}")


def rounded(source: Path, calibration: Array, images: Array) -> list[list[Cell]]:
    """SQNR of the float model with its activations rounded, a row for each way of choosing ranges and a column for each of `BITS`."""
    choices: list[Any] = []

    def remembered(choice: Any) -> Any:
        choices.append(choice)
        return ranges(choice)

    ranges = rounded_activations._Choice.ranges
    options: dict[str, Any] = {"format": "qdq-int8", "prefer": "size", "quantizer": "rtn", "alpha": 0, "feedback": False}
    with mock.patch.object(rounded_activations._Choice, "ranges", remembered), quiet():
        magr_onnx.optimize(source, {"images": calibration}, activation_range="daq", progress=False, **options)
    with Session(source) as session:
        data = open_data({"images": images}, session.inputs)
    rows: list[list[Cell]] = []
    for method in METHODS:
        tried = [replace(choices[0], method=method, kind=replace(choices[0].kind, bits=bits)) for bits in BITS]
        trials = [choice.grids(choice.ranges()) for choice in tried]
        errors = output_errors(choices[0].model, choices[0].marks, trials, data, choices[0].provider)
        rows.append([method, *(f"{-10 * np.log10(error):.2f}" for error in errors)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for trained networks and temporary files")
    parser.add_argument("--models", default="espcn,edsr", help=f"comma-separated, of {','.join(NETWORKS)},waifu2x")
    parser.add_argument("--waifu2x", type=Path, help="file of weights")
    args = parser.parse_args()
    print(header("Networks that enlarge images"), flush=True)
    (calibration, _), (images, large) = pairs(SAMPLES, 1), pairs(SAMPLES, 2)
    for name in args.models.split(","):
        source = made(name, args.work, args.waifu2x)
        exact = outputs(source, images)
        print(
            f"## {name}\n\n{table(('activations rounded, dB', *(f'{b} bits' for b in BITS)), rounded(source, calibration, images))}\n",
            flush=True,
        )
        rows: list[list[Cell]] = []
        for method, model in files(source, args.work, calibration):
            found = outputs(model, images)
            sqnr = "-" if method == "float" else f"{decibels(exact, found - exact):.2f}"
            rows.append([method, sqnr, f"{decibels(1, np.clip(found, 0, 1) - large):.3f}"])
            progress(f"{name}: {rows[-1]}")
        print(table(("files of 8 bits", "SQNR, dB", "PSNR, dB"), rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
