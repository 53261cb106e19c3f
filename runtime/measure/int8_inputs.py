"""What kernels gain by rounding their float inputs to int8: time of single nodes, and whether a model works a token at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.kv_cache import TOKENS
from magr_onnx.report.validation import Latency
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.measure.validate import latency
from magr_onnx.runtime.ort.session import Batch, Model, Session, as_floats

SECONDS = 0.1  # of timing, a shape
_SAME = 1e-3  # difference from equal outputs, of their largest value, that rounding explains


def time_int8(node: ir.Node, rows: int, provider: str, decide: Callable[[ir.Node, bool], object]) -> Latency:
    """Time one node with int8 inputs against float ones, on random rows.

    Args:
        node: A node whose first input ``(rows, K)`` is the only one that is no constant; it has an attribute ``K``.
        rows: Rows of that.
        provider: Where to run it.
        decide: Make a node compute with int8 inputs, or with float ones.

    Returns:
        The times: ``quantized_ms`` with int8 inputs.
    """
    models = []
    k, scales = node.attributes["K"].as_int(), node.inputs[2]
    assert scales is not None
    assert scales.dtype is not None
    for int8 in (False, True):
        x = ir.val("x", scales.dtype, ir.Shape([rows, k]))
        constants = [v and ir.Value(name=v.name, type=v.type, shape=v.shape, const_value=v.const_value) for v in node.inputs[1:]]
        copy = ir.Node(node.domain, node.op_type, [x, *constants], node.attributes.values(), version=node.version, name=node.name)
        copy.outputs[0].name, copy.outputs[0].dtype = "y", scales.dtype
        decide(copy, int8)
        graph = ir.Graph(
            [x], copy.outputs, nodes=[copy], initializers=list(filter(None, constants)), opset_imports={"": 21, node.domain: 1}
        )
        models.append(ir.Model(graph, ir_version=10))
    data = np.random.default_rng(0).standard_normal((rows, k)).astype(scales.dtype.numpy())
    return latency(models[0], models[1], in_memory([{"x": data}], "random rows"), provider, SECONDS)


def is_causal(model: Model, data: Batches, provider: str) -> bool:
    """Return whether outputs at a position of a sequence of tokens depend on that token and those before it only.

    It changes one token in the middle of the first batch, and runs the model with and without that.
    """
    batch: Batch = next(iter(data))
    tokens = batch.get(TOKENS)
    if tokens is None or np.ndim(tokens) != 2 or np.shape(tokens)[1] < 3:
        return False
    middle = np.shape(tokens)[1] // 2
    changed = np.array(tokens)
    changed[:, middle] = np.where(changed[:, middle] == changed[:, 0], changed[:, -1], changed[:, 0])
    with Session(model, provider) as session:
        results = [[as_floats(y) for y in session.run({**batch, TOKENS: ids})] for ids in (tokens, changed)]
    for y, z in zip(*results, strict=True):
        if y is None or z is None or y.ndim != 3 or y.shape != z.shape or y.shape[:2] != changed.shape:
            continue
        moved = np.abs(y - z).max(axis=2) > _SAME * np.abs(y).max()
        return bool(moved[:, middle:].any(axis=1).any() and not moved[:, :middle].any() and moved[:, middle + 1 :].any())
    return False
