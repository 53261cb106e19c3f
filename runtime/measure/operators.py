"""Where the time of a model goes, by operators of the graph that onnxruntime makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from magr_onnx.model_io.legacy import read
from magr_onnx.runtime.ort.session import Batch, Model, Session

RUNS = 5
ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")


def rounds_activations(model: Model) -> bool:
    """Return whether a model rounds activations, and so can compute in integers."""
    loaded = model if isinstance(model, ir.Model) else read(Path(model))
    return any(node.op_type in ROUNDING for node in loaded.graph.all_nodes())


def operator_shares(model: Model, batch: Batch, provider: str) -> dict[str, float]:
    """Measure the share of every operator in the time of all, the largest first.

    Args:
        model: The model.
        batch: What to run it on, once to warm up and `RUNS` times.
        provider: Where to run it.

    Raises:
        RuntimeFailure: It does not load or run.
    """
    with (
        tempfile.TemporaryDirectory(prefix="onnx-magr-") as folder,
        Session(model, provider, profile=str(Path(folder, "profile"))) as session,
    ):
        for _ in range(1 + RUNS):
            session.run(batch)
        kernels = [event for event in session.end_profile() if event["name"].endswith("_kernel_time")]
    times: Counter[str] = Counter()
    for event in kernels[len(kernels) // (1 + RUNS) :]:
        times[event["args"]["op_name"]] += event["dur"]
    total = max(sum(times.values()), 1)
    return {operator: microseconds / total for operator, microseconds in times.most_common()}
