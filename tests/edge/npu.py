"""Runs models on an NPU's emulator, in a Python of its own that has onnxruntime-qnn; see `tests.edge.test_npu`.

    python npu.py FOLDER

``FOLDER/jobs.json`` has a list of ``{"model", "feeds", "architecture"}``; for each, the outputs go to ``FOLDER/INDEX.npz`` and what ran
where to ``FOLDER/INDEX.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn  # type: ignore[import-not-found]

SOC_MODELS = {"68": "30", "73": "43"}


def run(job: dict[str, Any], folder: Path, index: int) -> None:
    devices = [device for device in ort.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
    options = ort.SessionOptions()
    options.log_severity_level, options.enable_profiling = 4, True
    options.profile_file_prefix = str(folder / "profile")
    architecture = job["architecture"]
    settings = {"backend_path": qnn.get_qnn_htp_path(), "htp_arch": architecture, "soc_model": SOC_MODELS[architecture]}
    options.add_provider_for_devices(devices[:1], settings)
    session = ort.InferenceSession(job["model"], options)
    feeds = dict(np.load(job["feeds"]))
    names, count = list(feeds), len(next(iter(feeds.values())))
    results = [session.run(None, {name: feeds[name][i : i + 1] for name in names}) for i in range(count)]
    outputs = {o.name: np.concatenate(arrays) for o, arrays in zip(session.get_outputs(), zip(*results, strict=True), strict=True)}
    np.savez(folder / f"{index}.npz", **outputs)  # type: ignore[arg-type]
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    ran = sorted({(args["node_index"], args["op_name"].partition("_")[0], args["provider"]) for args in kernels})
    (folder / f"{index}.json").write_text(json.dumps([[operator, provider] for _, operator, provider in ran]))


def main() -> None:
    folder = Path(sys.argv[1])
    ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        try:
            run(job, folder, index)
        except Exception as error:
            (folder / f"{index}.error").write_text(str(error))


if __name__ == "__main__":
    main()
