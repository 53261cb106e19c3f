"""Olive's own passes of weight-only quantization."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from adapter import Task, only, save, serve


def quantize(task: Task, name: str, **options: Any) -> None:
    import onnx
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes.olive_pass import create_pass_from_dict

    kind = OlivePackageConfig.load_default_config().import_pass_module(name)
    run = create_pass_from_dict(kind, {"block_size": task.block, **options}, disable_search=True)
    with tempfile.TemporaryDirectory() as folder:
        made = run.run(ONNXModelHandler(str(task.model)), str(Path(folder, "out.onnx")))
        save(onnx.load(made.model_path), task)


def rtn(task: Task, symmetric: bool) -> None:
    quantize(task, "OnnxBlockWiseRtnQuantization", bits=task.bits, is_symmetric=symmetric)


def kquant(task: Task) -> None:
    quantize(task, "OnnxKQuantQuantization", bits=task.bits)


def hqq(task: Task) -> None:
    only(4, task)
    quantize(task, "OnnxHqqQuantization")


METHODS = {
    "OnnxBlockWiseRtnQuantization": partial(rtn, symmetric=False),
    "OnnxBlockWiseRtnQuantization, symmetric": partial(rtn, symmetric=True),
    "OnnxHqqQuantization": hqq,
    "OnnxKQuantQuantization": kquant,
}

if __name__ == "__main__":
    serve("olive-ai", METHODS)
