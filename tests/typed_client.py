"""A typed client of the public interface. Never run: pyright checks it against the installed package, in strict mode."""

# pyright: strict
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

import magr_onnx
import magr_onnx.torch
from magr_onnx.passes import CompensateBias, EmitMatMulNBits, MagR, Quantize


def progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}")


def optimize(source: Path, batches: list[dict[str, np.ndarray]]) -> float:
    model, report = magr_onnx.optimize(
        source, batches, bits=4, block_size=32, output=source.with_suffix(".int4.onnx"), progress=progress, exclude=["*head*"]
    )
    worst = max((row.error or 0.0 for row in report.layers), default=0.0)
    print(report.to_text(), model.ir_version, report.bytes_after / report.bytes_before)
    for row in report.skipped:
        print(row.name, row.reason)
    return worst


def in_memory(proto: onnx.ModelProto) -> ir.Model:
    try:
        result = magr_onnx.optimize(proto, effort="fast", format="dynamic-int8", target="x86-avx2")
    except magr_onnx.ModelError as error:
        raise SystemExit(str(error)) from error
    return result.model


def look(source: str) -> list[str]:
    found = magr_onnx.inspect(source)
    return [f"{skip.name}: {skip.reason}" for skip in found.skipped]


def judge(source: str, result: str, data: str) -> float | None:
    validation = magr_onnx.validate(source, result, data)
    cosines = [output.cosine for outputs in validation.arithmetics.values() for output in outputs]
    return min(cosines, default=None)


def prove(source: str) -> bool:
    return magr_onnx.verify(source, accumulator=magr_onnx.Accumulator(16, 64, 32)).ok


def passes(model: ir.Model) -> ir.Model:
    steps = ir.passes.Sequential(MagR(alpha=1e-3), Quantize(method="gptq", bits=4), CompensateBias(), EmitMatMulNBits())
    return steps(model).model


def written_down(source: str) -> magr_onnx.Report:
    recipe = magr_onnx.Recipe.load("recipe.toml")
    report = magr_onnx.optimize(source, recipe=recipe, preset="llm-int4", layers=[{"match": "*head*", "bits": 8}]).report
    report.save("report.html")
    return magr_onnx.Report.from_json(report.to_json())


def folder(source: Path) -> dict[str, int]:
    result = magr_onnx.optimize_folder(source, "texts.txt", output=source.with_name("int4"), models=["decoder*"], bits=4)
    return {name: report.bytes_after for name, report in result.reports.items()}


def module(net: torch.nn.Module, rows: list[torch.Tensor]) -> dict[str, str]:
    model, report = magr_onnx.torch.optimize(net, rows[0], calibration=rows, output="net.onnx", bits=4)
    print(model.ir_version, report.to_text())
    reduced = magr_onnx.torch.magr_(net, rows[0], rows)
    return dict(reduced.unchanged)
