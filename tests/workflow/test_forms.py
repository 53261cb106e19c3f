"""Every odd form of a file that onnxruntime runs is optimized, or left with a reason, by every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.errors import ModelError
from tests.forms.build import FORMS, as_inputs, model, write
from tests.forms.judge import feeds, judge, run, session_of

LEFT = {
    "opset-6": "has opset 6, and 7 to",
    "initializer-twice": "b initializer name is not unique",
    "tied-embedding": "its float weight would stay in the file for others",
    "tied-embedding-in-branches": "its float weight would stay in the file for others",
    "no-nodes": "it has no MatMul, Gemm or convolution",
}
"""Forms that onnxruntime runs and that are refused, with the reason."""

NOT_RUN = {"custom-operator", "dimension-of-zero", "ir-of-the-future", "no-outputs", "nodes-of-one-name", "opset-of-the-future"}
"""Forms that onnxruntime does not run."""


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_onnxruntime_runs_are_optimized_or_left_with_a_reason(name: str, tmp_path: Path) -> None:
    verdicts = judge(name, tmp_path)
    assert not any("CRASH" in v or "OTHER" in v for v in verdicts.values()), verdicts
    assert verdicts["onnxruntime"].startswith("runs") == (name not in NOT_RUN), verdicts
    for command, verdict in verdicts.items():
        if verdict.startswith("refused") and name not in NOT_RUN:
            assert LEFT.get(name, "no such reason") in verdict, (command, verdict)
        assert float(verdict.partition(", error ")[2] or 0) < 0.2, (command, verdict)
        if " of its size" in verdict:
            assert float(verdict.partition(" layers, ")[2].split()[0]) < 1, (command, verdict)


def test_there_are_many_forms() -> None:
    assert len(FORMS) >= 90
    assert NOT_RUN | LEFT.keys() <= FORMS.keys()


def test_declarations_are_written_back_as_they_were(tmp_path: Path) -> None:
    for name in ("output-of-maps-by-string", "output-without-a-shape", "output-without-a-type", "input-without-a-shape", "input-of-maps"):
        path, out = write(name, tmp_path), tmp_path / "out.onnx"
        magr_onnx.optimize(path, output=out, progress=False)
        before, after = onnx.load(path).graph, onnx.load(out).graph
        assert list(before.input) == list(after.input), name
        assert list(before.output) == list(after.output), name


def test_maps_are_compared_by_their_values(tmp_path: Path) -> None:
    path, out = write("output-of-maps-alone", tmp_path), tmp_path / "out.onnx"
    magr_onnx.optimize(path, output=out, progress=False)
    batch = feeds(session_of(path))
    expected, actual = (np.array([list(row.values()) for row in run(p, batch)["maps"]]) for p in (path, out))
    result = magr_onnx.validate(path, out, batch, progress=False, latency=False)
    metrics = result.arithmetics["default"][0]
    assert metrics.output == "maps"
    assert metrics.sqnr_db == pytest.approx(10 * np.log10((expected**2).sum() / ((expected - actual) ** 2).sum()), abs=0.1)


def test_inputs_with_values_become_constants_unless_they_are_kept(tmp_path: Path) -> None:
    path, out = write("weights-are-inputs-ir4", tmp_path), tmp_path / "out.onnx"
    note = next(n for n in magr_onnx.optimize(path, output=out, progress=False).report.notes if "were inputs too" in n)
    assert note.startswith("3 initializers were inputs too (w, b, v), and are constants now")
    assert "--keep-overridable" in note
    assert [i.name for i in onnx.load(out).graph.input] == ["x"]
    assert len(magr_onnx.inspect(path).layers) == 2
    with pytest.raises(ModelError, match="weight is a graph input that a caller may override"):
        magr_onnx.optimize(path, output=out, progress=False, keep_overridable=True)
    assert [s.reason for s in magr_onnx.inspect(path, keep_overridable=True).skipped] == [
        "weight is a graph input that a caller may override"
    ] * 2


def test_one_weight_that_is_kept_can_still_be_fed(tmp_path: Path) -> None:
    proto, out = as_inputs(model()), tmp_path / "out.onnx"
    del proto.graph.input[1:3]  # v is left
    _, report = magr_onnx.optimize(proto, output=out, progress=False, keep_overridable=True)
    assert [row.weight for row in report.layers] == ["w"]
    session = session_of(out)
    assert [i.name for i in session.get_overridable_initializers()] == ["v"]
    zeros: Any = {**feeds(session), "v": np.zeros((48, 32), np.float32)}
    assert not np.asarray(session.run(None, zeros)[0]).any()


@pytest.mark.parametrize(
    "name", ["output-of-maps", "output-of-a-sequence", "output-of-a-sequence-beside-a-mask", "optional-output", "string-output"]
)
@pytest.mark.parametrize("options", [{"target_size": "70%"}, {"max_loss": "0.1"}, {"format": "qdq"}], ids=["size", "loss", "opset"])
def test_budgets_and_newer_opsets_take_outputs_that_are_no_tensors(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A loss is measured on what floats there are; a converter of opsets may not see maps."""
    path, out = write(name, tmp_path), tmp_path / "out.onnx"
    data = [feeds(session_of(path), seed=seed) for seed in range(4)]
    magr_onnx.optimize(path, data, output=out, validation_data=data[:1], progress=False, effort="fast", **options)  # type: ignore[arg-type]
    before, after = onnx.load(path), onnx.load(out)
    assert list(after.graph.output) == list(before.graph.output)
    assert {entry.domain for entry in after.opset_import} - {entry.domain for entry in before.opset_import} <= {"com.microsoft"}


def test_a_traditional_operator_that_reads_maps_is_carried_through_a_converter_of_opsets(tmp_path: Path) -> None:
    path, out = write("input-of-maps", tmp_path), tmp_path / "out.onnx"
    magr_onnx.optimize(path, output=out, format="qdq", progress=False)
    batch = feeds(session_of(path))
    expected, actual = run(path, batch)["y"], run(out, batch)["y"]
    assert np.linalg.norm(actual - expected) < 0.2 * np.linalg.norm(expected)
