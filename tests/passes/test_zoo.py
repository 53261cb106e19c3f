"""Every trap of the zoo: its layers become what they must, and its outputs follow from the codes in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from magr_onnx import optimize
from magr_onnx.errors import MagrError
from magr_onnx.models.zoo import ZOO, Trap
from magr_onnx.models.zoo.trap import CONVERTED
from magr_onnx.report.data import Report
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.helpers import emitted_weight
from tests.pairwise import each_value

CONVERTING = [t for t in ZOO.values() if t.refused is None]
REFUSED = [t for t in ZOO.values() if t.refused is not None]
RUNS: dict[str, dict[str, Any]] = {
    "data-free": {"bits": 8, "block_size": 16},
    "calibrated": {"bits": 8, "block_size": 16, "bias": "none"},
    "qdq": {"bits": 8, "block_size": None, "format": "qdq"},
}


def fates(report: Report) -> dict[str, str]:
    """What became of every layer, by name."""
    return {row.name: CONVERTED for row in report.layers} | {row.name: row.reason for row in report.skipped}


def weights_in(path: Path, report: Report) -> dict[str, Any]:
    """The matrix of every converted layer, read from the file."""
    nodes = {node.name: node for node in ir.load(path).graph.all_nodes()}
    return {row.name: emitted_weight(nodes[row.emitted]) for row in report.layers}


@pytest.mark.parametrize(("trap", "run"), each_value(CONVERTING, list(RUNS)))
def test_layers_become_what_they_must_and_outputs_follow_from_the_codes(trap: Trap, run: str, tmp_path: Path) -> None:
    model, rng, path = trap.build(), np.random.default_rng(0), tmp_path / "q.onnx"
    onnx.checker.check_model(model, full_check=True)
    data = [trap.feeds(rng) for _ in range(8)] if run == "calibrated" else None
    report = optimize(model, data, output=path, **{**RUNS[run], **trap.options}).report
    assert fates(report) == trap.layers
    onnx.checker.check_model(str(path))
    feeds = trap.feeds(rng)
    with Session(path, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        got = session.run(feeds)
    with Session(ir.from_proto(model)) as session:
        floats = session.run(feeds)
    wanted = trap.evaluate(feeds, weights_in(path, report))
    assert len(got) == len(wanted) == len(floats)
    for ours, numpys, original in zip(got, wanted, floats, strict=True):
        fine = 2e-2 if original.dtype == np.float16 else 1e-4
        assert (ours.shape, ours.dtype) == (original.shape, original.dtype)
        np.testing.assert_allclose(ours, numpys, rtol=fine, atol=fine)
        np.testing.assert_allclose(ours, original, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trap", REFUSED, ids=lambda t: t.name)
def test_refused_models_are_refused_with_the_reason(trap: Trap, tmp_path: Path) -> None:
    with pytest.raises(MagrError, match=trap.refused):
        optimize(trap.build(), output=tmp_path / "q.onnx", **trap.options)
    assert list(tmp_path.iterdir()) == []
