"""Runs models on an execution provider and on the CPU, in a Python of its own that has it; see `tests.edge.test_providers`.

    python providers.py FOLDER RESULTS PROVIDER [KEY=VALUE ...]

``FOLDER/jobs.json`` has a list of ``{"model", "feeds"}``; for each, the outputs there and on the CPU go to
``RESULTS/INDEX.npz``, as ``actual`` and ``expected``, what ran where to ``RESULTS/INDEX.json``, and what went wrong to
``RESULTS/INDEX.error``. Keys are options of the provider.
On the CPU files run as they are written, without optimizations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

CPU = "CPUExecutionProvider"


def answers(model: str, feeds: dict[str, Any], providers: list[Any], folder: Path) -> tuple[Any, list[list[str]]]:
    """The output, and every operator that ran with its provider."""
    options = ort.SessionOptions()
    options.log_severity_level, options.enable_profiling, options.intra_op_num_threads = 4, True, 1
    options.profile_file_prefix = str(folder / "profile")
    if providers == [CPU]:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=providers)
    (output,) = session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    ran = sorted({(int(args["node_index"]), args["op_name"], args["provider"]) for args in kernels})
    return output, [[operator, provider] for _, operator, provider in ran]


def main() -> None:
    folder, results, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    settings = dict(argument.split("=", 1) for argument in sys.argv[4:])
    results.mkdir()
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        feeds = dict(np.load(job["feeds"]))
        try:
            actual, ran = answers(job["model"], feeds, [(name, settings), CPU], results)
            expected, _ = answers(job["model"], feeds, [CPU], results)
        except Exception as error:
            (results / f"{index}.error").write_text(str(error))
            continue
        np.savez(results / f"{index}.npz", actual=actual, expected=expected)
        (results / f"{index}.json").write_text(json.dumps(ran))


if __name__ == "__main__":
    main()
