"""Workflows that `test_olive` runs in one process of their own: importing Olive takes seconds, and changes much for those who come after.

``python -m tests.olive_workflows FOLDER`` reads ``model.onnx``, ``inputs.npz`` and ``parts/`` there and prints what happened as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from olive.data.registry import Registry
from olive.hardware import DEFAULT_CPU_ACCELERATOR
from olive.workflows import run

from magr_onnx.integrations.olive import OnnxMagr, package_config


class _Samples:
    """What a user's data script would hold: a dataset of samples and labels."""

    def __init__(self, path: str) -> None:
        self.x = np.load(path)["x"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        return {"x": self.x[index]}, 0


@Registry.register_dataset("npz_samples")
def npz_samples(path: str, **_: Any) -> _Samples:
    return _Samples(path)


def workflow(folder: Path, name: str, model: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """Run one pass of ours; operators and converted layers of what comes out, or the error."""
    extra = {key: config.pop(key) for key in ("data_configs", "search_strategy", "evaluators", "evaluator") if key in config}
    out = folder / name
    steps = {
        "input_model": model or {"type": "OnnxModel", "model_path": str(folder / "model.onnx")},
        "passes": {"quantize": {"type": "OnnxMagr", **config}},
        "output_dir": str(out),
        "cache_dir": str(folder / "cache"),
        "log_severity_level": 3,
        **extra,
    }
    try:
        run(steps, package_config=package_config())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    files = sorted(out.rglob("*.onnx"))
    return {
        "models": {path.relative_to(out).as_posix(): [n.op_type for n in onnx.load(path).graph.node] for path in files},
        "codes": [_codes(path) for path in files],
        "reports": sorted(path.relative_to(out).as_posix() for path in out.rglob("*.magr.json")),
        "config": json.loads((out / "model_config.json").read_text()) if (out / "model_config.json").is_file() else None,
    }


def _codes(path: Path) -> str:
    return "".join(sorted(onnx.numpy_helper.to_array(t).tobytes().hex()[:64] for t in onnx.load(path).graph.initializer))


def refusal(**config: Any) -> str:
    """What is said of values before any pass of a workflow runs; nothing where they are taken."""
    try:
        OnnxMagr.generate_config(DEFAULT_CPU_ACCELERATOR, config, disable_search=True)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    inputs = str(folder / "inputs.npz")
    found = {"first": workflow(folder, "first", calibration=inputs)}
    runs = folder / "cache" / "default_workflow" / "runs"
    count = len(list(runs.iterdir()))
    found["again"] = workflow(folder, "again", calibration=inputs)
    found["runs"] = {"again": len(list(runs.iterdir())) - count}
    arrays = np.load(inputs)
    np.savez(folder / "inputs.npz", x=arrays["x"] * np.linspace(0.1, 3, arrays["x"].shape[-1], dtype=np.float32))
    found["other_data"] = workflow(folder, "other_data", calibration=inputs)
    found["runs"]["other_data"] = len(list(runs.iterdir())) - count
    data = {"name": "samples", "load_dataset_config": {"type": "npz_samples", "params": {"path": inputs}}}
    data |= {"dataloader_config": {"params": {"batch_size": 12}}}
    found["data_config"] = workflow(folder, "data_config", data_configs=[data], data_config="samples")
    found["wrong"] = workflow(folder, "wrong", format="qdq", bits=2, accuracy_level=4, calibration="nowhere.npz")
    found["refusals"] = {
        "ranges": refusal(format="qdq-int8"),
        "size": refusal(target_size="30%"),
        "loss": refusal(max_loss="1%"),
        "feedback": refusal(feedback=True),
        "provider": refusal(provider="bogus", format="qdq", accuracy_level=4),
        "layer": refusal(layer=[{"match": "up", "bits": 9}]),
        "data": refusal(format="qdq-int8", calibration=inputs),
        "shards": refusal(shard_size="1MB", bits=4),
    }
    found["mistyped"] = workflow(folder, "mistyped", format="int4")
    found["out_of_range"] = workflow(folder, "out_of_range", bits=9)
    (folder / "recipe.toml").write_text('version = 1\ncalibration = "inputs.npz"\nbits = 8\n')
    own = {"recipe": str(folder / "recipe.toml"), "format": "qdq", "layer": [{"match": "up", "bits": 3}]}
    found["recipe"] = workflow(folder, "recipe", **own)
    found["recipe"]["layers"] = json.loads((folder / "recipe" / "model.magr.json").read_text())["layers"]
    found["unknown"] = workflow(folder, "unknown", bitz=4)
    np.savez(folder / "misfit.npz", y=np.zeros((4, 3), np.float32))
    found["data_misfit"] = workflow(folder, "data_misfit", calibration=str(folder / "misfit.npz"))
    parts = {"type": "CompositeModel", "model_component_names": ["a", "b"], "model_components": []}
    parts["model_components"] = [{"type": "OnnxModel", "model_path": str(folder / "parts" / f"{n}.onnx")} for n in "ab"]  # type: ignore[assignment]
    composite = {"type": "CompositeModel", "config": {k: v for k, v in parts.items() if k != "type"}}
    found["composite"] = workflow(folder, "composite", composite, calibration=str(folder / "parts"), block_size="channel")
    search = {"execution_order": "joint", "sampler": "sequential"}
    metric = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 1, "higher_is_better": False}]}
    judged = {"search_strategy": search, "evaluators": {"size": {"type": "OnnxEvaluator", "metrics": [metric]}}, "evaluator": "size"}
    found["searched"] = workflow(folder, "searched", bits=[8, 4, 2], format="qdq", **judged)
    found["no_recipe"] = workflow(folder, "no_recipe", recipe="nowhere.toml", bits=[8, 4], **judged)
    found["described"] = {name: p.description for name, p in OnnxMagr.default_config(DEFAULT_CPU_ACCELERATOR).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
