"""A model larger than the memory it is given: peak memory, and time a parameter against a model of one layer of the same shape.

    python tests/benchmarks/large.py FOLDER [--layers 11] [--limit-gib 3] [--run data-free] [--run calibrated] [--options "..."]

Builds a slice of a 7B-shaped decoder (hidden 4096, feed-forward 11008, 32 heads, RMS norms, SwiGLU; hidden states in and out) with
random float32 weights of 0.81 GB a layer in external data, written streaming. float32 is the harder case: models of this size
are published in half precision, which has half the bytes a stage. It is then optimized by the command line in a process of its own under
a memory limit (the memory controller of cgroups v1 where it may be used, which counts mapped files too; else RLIMIT_DATA), and the
result is read back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from magr_onnx.passes.emit.readback import iterate_weights

HIDDEN, FFN, HEADS = 4096, 11008, 32
CGROUP = Path("/sys/fs/cgroup/memory")
GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """What a run needed: seconds, and of processors; bytes of memory at most: of the process, of its group without and with file pages."""

    run: str
    parameters: int
    seconds: float
    cpu_seconds: float
    max_rss: int
    anonymous: int
    with_files: int
    layers_read_back: int


def build(
    folder: Path, layers: int, hidden: int = HIDDEN, ffn: int = FFN, heads: int = HEADS, *, seed: int = 0, holes: bool = False
) -> Path:
    """Write the model, a weight at a time, or with ``holes`` in the place of weights, which take no room on the disk; returns its path."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    tensors: list[TensorProto] = []
    path = folder / f"decoder-{layers}.onnx"
    head = hidden // heads

    with (folder / f"{path.name}.data").open("wb") as file:

        def weight(name: str, *shape: int) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", f"{path.name}.data"), ("offset", str(file.tell())), ("length", str(4 * math.prod(shape)))):
                tensor.external_data.add(key=key, value=value)
            if holes:
                file.truncate(file.seek(4 * math.prod(shape), os.SEEK_CUR))
            else:
                array = rng.standard_normal(shape, dtype=np.float32)
                array *= np.float32(shape[0] ** -0.5)
                file.write(array)
            tensors.append(tensor)
            return name

        def small(name: str, values: Any, kind: Any = np.float32) -> str:
            tensors.append(onnx.numpy_helper.from_array(np.asarray(values, kind), name))
            return name

        def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
            return output

        small("eps", 1e-5)
        small("last", [-1], np.int64)
        small("two", 2.0)
        small("scale", head**-0.5)
        small("split", [0, 0, heads, head], np.int64)
        small("merge", [0, 0, hidden], np.int64)

        def norm(x: str, name: str) -> str:
            square = node("ReduceMean", [node("Pow", [x, "two"], f"{name}.square"), "last"], f"{name}.mean", keepdims=1)
            root = node("Sqrt", [node("Add", [square, "eps"], f"{name}.variance")], f"{name}.root")
            return node("Mul", [node("Div", [x, root], f"{name}.unit"), small(f"{name}.gain", np.ones(hidden))], name)

        def linear(x: str, name: str, k: int, n: int) -> str:
            return node("MatMul", [x, weight(f"{name}.weight", k, n)], name)

        x = "hidden_states"
        for i in range(layers):
            at = f"layers.{i}"
            y = norm(x, f"{at}.norm1")
            parts = []
            for part in "qkv":
                rows = node("Reshape", [linear(y, f"{at}.{part}", hidden, hidden), "split"], f"{at}.{part}.heads")
                parts.append(node("Transpose", [rows], f"{at}.{part}.t", perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]))
            scores = node("Mul", [node("MatMul", parts[:2], f"{at}.scores"), "scale"], f"{at}.scaled")
            mixed = node("MatMul", [node("Softmax", [scores], f"{at}.softmax", axis=-1), parts[2]], f"{at}.mixed")
            joined = node("Reshape", [node("Transpose", [mixed], f"{at}.mixed.t", perm=[0, 2, 1, 3]), "merge"], f"{at}.joined")
            x = node("Add", [x, linear(joined, f"{at}.o", hidden, hidden)], f"{at}.attended")
            y = norm(x, f"{at}.norm2")
            gate, up = linear(y, f"{at}.gate", hidden, ffn), linear(y, f"{at}.up", hidden, ffn)
            silu = node("Mul", [gate, node("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.silu")
            x = node("Add", [x, linear(node("Mul", [silu, up], f"{at}.gated"), f"{at}.down", ffn, hidden)], f"{at}.out")
    shape = ["batch", "sequence", hidden]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("hidden_states", x)]
    graph = helper.make_graph(nodes, "decoder", ends[:1], ends[1:], tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString())
    return path


def calibration(folder: Path, batches: int = 8, length: int = 128, hidden: int = HIDDEN) -> Path:
    """A folder of batches of hidden states."""
    rng = np.random.default_rng(1)
    found = folder / f"calibration-{batches}x{length}x{hidden}"
    found.mkdir(exist_ok=True)
    for i in range(batches):
        np.savez(found / f"{i}.npz", hidden_states=rng.standard_normal((1, length, hidden), dtype=np.float32))
    return found


class Limit:
    """A memory limit for a child process, and what it needed at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.anonymous = self.with_files = 0
        self._group: Path | None = CGROUP / f"onnx-magr-{os.getpid()}"
        try:
            self._group.mkdir()
            (self._group / "memory.limit_in_bytes").write_text(str(limit))
        except OSError:
            self._group = None

    def enter(self) -> None:
        """In the child, before it starts."""
        if self._group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (self._limit, self._limit))
        else:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def watch(self, pid: int) -> tuple[int, resource.struct_rusage]:
        """Until the child ends, take note of what it has; returns its exit code (negative: a signal) and what it used."""
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                break
            if self._group is not None:
                stat = dict(line.split() for line in (self._group / "memory.stat").read_text().splitlines())
                self.anonymous = max(self.anonymous, int(stat["total_rss"]))
            time.sleep(0.05)
        if self._group is not None:
            self.with_files = int((self._group / "memory.max_usage_in_bytes").read_text())
            while (self._group / "cgroup.procs").read_text():  # processes that it started end a moment later
                time.sleep(0.05)
            self._remove()
        return os.waitstatus_to_exitcode(status), usage

    def _remove(self) -> None:
        """Remove the group; pages that the processes gave back are counted a little longer."""
        assert self._group is not None
        for left in reversed(range(100)):
            try:
                (self._group / "memory.force_empty").write_text("0")
                self._group.rmdir()
            except OSError:
                if not left:
                    raise
                time.sleep(0.1)
            else:
                return


def measure(model: Path, output: Path, name: str, arguments: Sequence[str], limit: int) -> Measured:
    """Optimize under the limit and read the result back."""
    command = [sys.executable, "-m", "magr_onnx.cli.main", "optimize", str(model), "-o", str(output), "--quiet", *arguments]
    bound = Limit(limit)
    begin = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=bound.enter)
    process.returncode, usage = bound.watch(process.pid)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode} after {seconds:.0f} s (-9: more memory than the limit)")
    parameters = back = 0
    for _, weight in iterate_weights(ir.load(output)):
        back, parameters = back + 1, parameters + weight.size
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(name, parameters, seconds, cpu, usage.ru_maxrss * 1024, bound.anonymous, bound.with_files, back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=11, help="of the large model; 11 are 8.9 GB")
    parser.add_argument("--small", type=int, default=1, help="layers of the model that time a parameter is compared with; 0 for none")
    parser.add_argument("--limit-gib", type=float, default=3.0)
    parser.add_argument("--run", action="append", choices=["data-free", "calibrated"], help="default: both")
    parser.add_argument("--options", default="", help="more options of onnx-magr optimize, as one text")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    data = calibration(given.folder)
    for run in given.run or ["data-free", "calibrated"]:
        seconds = []
        for layers in filter(None, (given.small, given.layers)):
            model = build(given.folder, layers)
            arguments = ["--max-memory", f"{given.limit_gib * 1.073741824:.3f}GB", *shlex.split(given.options)]
            if run == "calibrated":
                arguments += ["--calibration", str(data), "--batch-size", "1"]
            result = measure(model, given.folder / "out.onnx", f"{run}, {layers} layers", arguments, int(given.limit_gib * GIB))
            seconds.append((result.seconds / result.parameters, result.cpu_seconds / result.parameters))
            found.append(asdict(result) | {"bytes": sum(p.stat().st_size for p in given.folder.glob(f"{model.name}*"))})
            print(json.dumps(found[-1]), flush=True)
            for path in [] if given.keep else [*given.folder.glob(f"{model.name}*"), *given.folder.glob("out.onnx*")]:
                path.unlink()
        if len(seconds) == 2:
            wall, cpu = (b / a for a, b in zip(*seconds, strict=True))
            print(f"{run}: {wall:.2f} times the seconds a parameter of the small model ({cpu:.2f} of processor time)", flush=True)


if __name__ == "__main__":
    main()
