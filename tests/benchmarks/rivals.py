"""Other tools' weight quantizers on our models: what each one's file is worth, at the same bits and block.

    python tests/benchmarks/rivals.py --data DATA --work WORK --out OUT --json FILE --env modelopt=PYTHON --env quark=PYTHON ...

Every tool runs in an environment of its own, by its adapter ``rivals/use_NAME.py``; ``--env NAME=PYTHON`` says where, and without it
this environment is tried. A tool that is not installed is listed as such; a method that fails is a row that says why. ``WORK`` is
accuracy.py's; files go to ``OUT`` and are deleted once judged. Rows that ``FILE`` holds already are not run again, so an interrupted run
goes on where it stopped.

A file is judged as accuracy.py does, except that 4-bit QDQ runs with float activations, as MatMulNBits does, where onnxruntime's default
is int8 (``session.qdq_matmulnbits_accuracy_level=0``). KL is the mean divergence of next-token distributions from the float model's, over
every eighth block. *Layers* are those whose weights in the file really lie on a grid of the bits asked, with a scale a block, of all
products with a constant weight. Seconds are of the whole process, from start to file.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from accuracy import MODELS, SETTINGS, Benchmark, Footnotes, Setting, divergences, float_outputs, metric_cells
from common import Cell, header, machine, progress, table
from onnx import numpy_helper
from onnx.inliner import inline_local_functions

import magr_onnx
from magr_onnx.runtime.ort.session import Arithmetic, Session

HERE = Path(__file__).parent
ADAPTERS = {path.stem.removeprefix("use_"): path for path in sorted((HERE / "rivals").glob("use_*.py"))}


# --- Tools --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool in its environment; without ``methods`` it is not installed, and ``version`` says what went wrong."""

    name: str
    package: str
    version: str
    methods: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(slots=True)
class Row:
    """One method at one setting on one model: its metrics, or why there are none."""

    model: str
    setting: str
    tool: str
    version: str
    method: str
    metrics: tuple[float, float] | None = None
    divergence: float | None = None
    quantized: int | None = None
    layers: int | None = None
    seconds: float | None = None
    megabytes: float | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, self.setting, self.tool, self.method


def run(command: tuple[str, ...], timeout: float) -> tuple[str, str | None]:
    """What an adapter printed, and why it failed if it did: the last line on stderr."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=tempfile.gettempdir())
    except subprocess.TimeoutExpired:
        return "", f"stopped after {timeout:.0f} s"
    except OSError as error:
        return "", str(error)
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).splitlines() if line.strip()]
    return done.stdout, (lines[-1].strip()[:200] if lines else f"exit status {done.returncode}") if done.returncode else None


def find_tool(name: str, python: str) -> Tool:
    command = (python, str(ADAPTERS[name]))
    printed, reason = run(command, 300)
    if reason is not None:
        return Tool(name, name, reason, (), command)
    told = json.loads(printed.splitlines()[-1])
    return Tool(name, told["package"], told["version"], tuple(told["methods"]), command)


# --- What a file holds --------------------------------------------------------------------------------------------------------


def on_grid(weight: npt.NDArray[Any], bits: int, block: int) -> bool:
    """Whether every ``block`` rows of a column of ``weight (K, N)`` hold at most ``2**bits`` different values."""
    padded = np.pad(weight, ((0, -len(weight) % block), (0, 0)), mode="edge")
    ordered = np.sort(padded.reshape(-1, block, weight.shape[1]), axis=1)
    return bool(((np.diff(ordered, axis=1) != 0).sum(axis=1) < 2**bits).all())


def constant_weights(model: onnx.ModelProto) -> list[npt.NDArray[Any]]:
    """The weights ``(K, N)`` of all MatMul and Gemm nodes that depend on no input, computed where they are not initializers."""
    held = {t.name: t for t in model.graph.initializer}
    known, nodes, wanted = {*held, ""}, [], []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in known and node.input[0] not in known:
            wanted.append((node.input[1], any(a.name == "transB" and a.i for a in node.attribute)))
        elif node.op_type == "Constant" or (node.input and known.issuperset(node.input)):
            nodes.append(node)
            known.update(node.output)
    names = sorted({name for name, _ in wanted} - set(held))
    arrays = {name: numpy_helper.to_array(held[name]) for name, _ in wanted if name in held}
    if names:
        graph = onnx.helper.make_graph(nodes, "weights", [], [onnx.ValueInfoProto(name=n) for n in names], list(model.graph.initializer))
        part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "weights.onnx")
            onnx.save(part, str(path))
            with Session(path, arithmetic=Arithmetic.UNOPTIMIZED) as session:
                arrays |= dict(zip(names, session.run({}, names), strict=True))
    return [arrays[name].T if transposed else arrays[name] for name, transposed in wanted if arrays[name].ndim == 2]


def count_layers(path: Path, setting: Setting) -> tuple[int, int]:
    """Layers on the setting's grid, and all layers."""
    model = inline_local_functions(onnx.load(str(path)))
    nodes = [{a.name: a.i for a in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"]
    found = [(n["bits"], n["block_size"]) == (setting.bits, setting.block) for n in nodes]
    found += [on_grid(w, setting.bits, setting.block or len(w)) for w in constant_weights(model)]
    return sum(found), len(found)


# --- The table ----------------------------------------------------------------------------------------------------------------


def measure(
    name: str, benchmark: Benchmark, reference: npt.NDArray[Any], tool: Tool, method: str, setting: Setting, output: Path, timeout: float
) -> Row:
    """Quantize in the tool's environment, judge the file, delete it."""
    row = Row(name, setting.label, tool.package, tool.version, method)
    output.unlink(missing_ok=True)
    begin = time.perf_counter()
    parts = (benchmark.model, benchmark.calibration, output, setting.bits, setting.block, method)
    _, row.reason = run((*tool.command, *(str(p if isinstance(p, str | int) else p.resolve()) for p in parts)), timeout)
    row.seconds = time.perf_counter() - begin
    if row.reason is None and not output.is_file():
        row.reason = "it wrote no file"
    try:
        if row.reason is None:
            row.quantized, row.layers = count_layers(output, setting)
            row.megabytes = output.stat().st_size / 1e6
            row.metrics = benchmark.metrics(benchmark.outputs(output, Arithmetic.FLOAT_QDQ), reference)
            if benchmark.columns[1] == "over float":
                row.divergence = float(divergences(every_eighth(benchmark), output, arithmetic=Arithmetic.FLOAT_QDQ).mean())
    except magr_onnx.MagrError as error:
        said = str(error).splitlines()[0].replace(str(output), "it")
        row.reason = f"onnxruntime refuses its file: {said[-160:]}"
    finally:
        output.unlink(missing_ok=True)
    return row


def every_eighth(benchmark: Benchmark) -> Benchmark:
    return replace(benchmark, test={name: array[::8] for name, array in benchmark.test.items()})


def render(benchmark: Benchmark, rows: list[Row]) -> str:
    """The table of one model, best methods of a setting first, failures last."""
    sign = 1 if benchmark.columns[1] == "over float" else -1
    notes = Footnotes()
    lines: list[list[Cell]] = []
    for row in sorted(rows, key=lambda r: (-int(r.setting[0]), r.metrics is None, sign * r.metrics[0] if r.metrics else 0)):
        a, b = (notes.mark(row.reason or "no reason given"), None) if row.metrics is None else metric_cells(benchmark, row.metrics)
        kl = None if row.divergence is None else f"{row.divergence:.5f}"
        layers = None if row.layers is None else f"{row.quantized}/{row.layers}"
        seconds = None if row.seconds is None or row.metrics is None else f"{row.seconds:.0f}"
        size = None if row.megabytes is None else f"{row.megabytes:.2f}"
        lines.append([row.setting, row.tool, row.method, a, b, *([kl] if sign > 0 else []), layers, seconds, size])
    kl_column = ("KL",) if sign > 0 else ()
    text = table(("setting", "tool", "method", *benchmark.columns, *kl_column, "layers", "seconds", "MB"), lines)
    return "\n".join([f"## {benchmark.title}", "", text, *([""] if notes.reasons else []), *notes.lines(), ""])


def load_rows(path: Path) -> dict[tuple[str, ...], Row]:
    if not path.is_file():
        return {}
    rows = [Row(**{**row, "metrics": row["metrics"] and tuple(row["metrics"])}) for row in json.loads(path.read_text())["rows"]]
    return {row.key: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books, stsb, lm and charlm")
    parser.add_argument("--work", type=Path, required=True, help="accuracy.py's work folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tools' files")
    parser.add_argument("--json", type=Path, required=True, help="the rows; read first, written after every one")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON", help=f"where a tool is ({', '.join(ADAPTERS)})")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (default {','.join(MODELS)})")
    parser.add_argument("--settings", default="4x32,2x32", help="comma-separated (default 4x32,2x32)")
    parser.add_argument("--tools", default=",".join(ADAPTERS), help=f"comma-separated (default {','.join(ADAPTERS)})")
    parser.add_argument("--methods", default="*", help="shell pattern of method names, to run a few (default all)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a method may take (default 600)")
    args = parser.parse_args()
    models, settings, tools = args.models.split(","), args.settings.split(","), args.tools.split(",")
    environments = dict(text.split("=", 1) for text in args.env)
    for given, known in ((models, MODELS), (settings, SETTINGS), (tools, ADAPTERS), (environments, ADAPTERS)):
        if unknown := [g for g in given if g not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = load_rows(args.json)
    found = [find_tool(name, environments.get(name, sys.executable)) for name in tools]

    print(header("Other tools"))
    for tool in found:
        print(f"- {tool.package}: {f'{tool.version}' if tool.methods else f'not installed ({tool.version})'}")
    print(flush=True)
    for name in models:
        benchmark = MODELS[name](args.data, args.work)
        reference = float_outputs(name, benchmark, args.work)
        for key in settings:
            for tool in found:
                for method in fnmatch.filter(tool.methods, args.methods):
                    setting = SETTINGS[key]
                    if (name, setting.label, tool.package, method) in rows:
                        continue
                    row = measure(name, benchmark, reference, tool, method, setting, args.out / f"{name}_{tool.name}.onnx", args.timeout)
                    what = row.reason if row.metrics is None else ", ".join(f"{m:.5f}" for m in row.metrics)
                    progress(f"{name}, {row.setting}, {row.tool}, {method}: {what} ({row.quantized}/{row.layers}, {row.seconds:.0f} s)")
                    rows[row.key] = row
                    args.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(r) for r in rows.values()]}, indent=2) + "\n")
        print(render(benchmark, [row for row in rows.values() if row.model == name]), flush=True)


if __name__ == "__main__":
    main()
