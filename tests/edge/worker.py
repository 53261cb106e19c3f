"""Runs models with onnxruntime: one process for many of them, because an emulated one takes seconds to start.

    python worker.py FOLDER

It needs numpy and onnxruntime and no other file, so that it runs wherever those two do. ``FOLDER/jobs.json`` lists the work, as
`tests.edge.process` writes it; the answers are ``0.out.npz``, ``1.out.npz``, ..., or ``0.error.txt`` where a model failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def run(job: dict[str, Any], folder: Path, index: int) -> None:
    """Run one model; arrays travel by position, since names of values need not be names of files."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not job["optimize"]:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    with np.load(folder / f"{index}.in.npz") as arrays:
        feeds = {name: arrays[f"arr_{i}"] for i, name in enumerate(job["inputs"])}
    names = np.array([output.name for output in session.get_outputs()])
    unfinished = folder / f"{index}.part.npz"
    np.savez(unfinished, *session.run(None, feeds), names=names)
    unfinished.rename(folder / f"{index}.out.npz")  # whole or not there, should this process die


def main(folder: Path) -> None:
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        try:
            run(job, folder, index)
        except Exception as error:  # of this model; the others still run
            (folder / f"{index}.error.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
