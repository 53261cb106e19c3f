"""Models that crash or hang onnxruntime: the caller lives on, and says what happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.errors import RuntimeFailure
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.runtime.measure import made_up
from magr_onnx.runtime.ort import opset_check, session, worker
from magr_onnx.runtime.ort.session import Weights

W = constant("w", 16, 8)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "m.onnx")
    return folder / "m.onnx"


def test_what_a_call_returns_and_raises(tmp_path: Path) -> None:
    path = saved(model("g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }", w=W), tmp_path)
    assert worker.run_in_worker(session.load, path=str(path), provider="cpu", weights=Weights.PACKED) is None
    with pytest.raises(RuntimeFailure, match="missing"):
        worker.run_in_worker(session.load, path=str(tmp_path / "missing.onnx"), provider="cpu", weights=Weights.PACKED)


def test_a_process_that_dies_is_an_error_and_the_next_call_works() -> None:
    with pytest.raises(worker.WorkerCrashed, match="SIGABRT"):
        worker.run_in_worker(os.abort)
    assert worker.run_in_worker(os.getpid) != os.getpid()


def test_relative_paths_are_those_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model("g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }", w=W)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        magr_onnx.optimize(saved(proto, Path()), output="q.onnx", bits=8, block_size=16)


def scan_of_nothing(opset: int) -> onnx.ModelProto:
    """Along any axis but the first, that ends the process in onnxruntime 1.31."""
    return model(
        """g (float[4, n] x) => (float[4, 8] y, float[4, s] z) {
            r = Reshape(x, all)
            [fc] y = MatMul(r, w)
            none = Slice(x, begin, begin, one)
            z = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], body = b (float[4] a) => (float[4] c) {
                c = Relu(a)
            }>(none)
        }""",
        opset=opset,
        w=W,
        all=np.array([4, 16]),
        begin=np.zeros(1, np.int64),
        one=np.ones(1, np.int64),
    )


def test_made_up_inputs_that_crash_onnxruntime_are_a_note(tmp_path: Path) -> None:
    report = magr_onnx.optimize(saved(scan_of_nothing(11), tmp_path), output=tmp_path / "q.onnx", format="qdq", bits=4).report
    assert any("is not known" in note and "crashed" in note for note in report.notes)
    assert (tmp_path / "q.onnx").is_file()


def test_made_up_inputs_that_never_end_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model(
        """g (float[n, 16] x, bool go) => (float[n, 8] y, float[n, 16] last) {
            [fc] y = MatMul(x, w)
            last = Loop(turns, yes, x) <body = b (int64 i, bool c, float[n, 16] s) => (bool d, float[n, 16] t) {
                d = Identity(c)
                t = Relu(s)
            }>
        }""",
        opset=11,
        w=W,
        turns=np.asarray(2**62),
        yes=np.asarray(True),
    )
    ask = worker._Worker.ask

    def impatient(self: worker._Worker, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Little time for what never ends alone: everything else takes as long as the machine needs for it."""
        endless = (opset_check.compare.__name__, made_up.measure.__name__)
        return ask(self, request, 1.0 if request["function"] in endless else seconds)

    monkeypatch.setattr(worker._Worker, "ask", impatient)
    report = magr_onnx.optimize(saved(proto, tmp_path), output=tmp_path / "q.onnx", format="qdq", bits=4).report
    assert any("did not finish within 1 s" in note for note in report.notes)
    assert (
        worker.run_in_worker(session.load, path=str(tmp_path / "q.onnx"), provider="cpu", weights=Weights.PACKED) is None
    )  # in a new process


def test_waiting_is_for_a_worker_that_was_started() -> None:
    worker._worker().close()
    worker.wait()
    assert not worker._worker().started
    worker.start()
    process = worker._worker()._process
    worker.wait()
    assert worker._worker()._process is process
    assert process is not None
    assert process.poll() is None
