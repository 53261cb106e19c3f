"""Whole runs whose layers are solved in torch, against the same runs in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import magr_onnx
from magr_onnx.core import backends, threads
from magr_onnx.errors import OptionError
from magr_onnx.models import bundled
from tests.graphs import chain, deep
from tests.helpers import few_samples
from tests.workflow.test_experts import batches, experts, form_of

FACTORIES = ("arange", "as_tensor", "asarray", "empty", "eye", "full", "ones", "tensor", "zeros")
needs_torch = pytest.mark.usefixtures("array_api")


@pytest.fixture
def array_api() -> None:
    pytest.importorskip("array_api_compat")


def codes_of(path: Path) -> dict[str, Any]:
    """The packed codes of a file, by the name of the tensor."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 3}


@needs_torch
@pytest.mark.parametrize("options", [{}, pytest.param({"effort": "fast", "block_size": "channel", "bits": 3}, marks=pytest.mark.slow)])
def test_layers_of_the_file_are_as_good_as_numpys(options: dict[str, Any], tmp_path: Path) -> None:
    """By the weights that stand in the file, and by the errors that the report has."""
    model, rng = deep(), np.random.default_rng(0)
    data = [{"x": rng.standard_normal((16, 32), np.float32) @ rng.standard_normal((32, 32), np.float32)} for _ in range(8)]
    errors, codes = {}, {}
    for device in ("cpu", "torch-cpu"):
        path = tmp_path / f"{device}.onnx"
        rows = magr_onnx.optimize(model, data, output=path, device=device, progress=None, **options).report.layers
        errors[device], codes[device] = [row.error for row in rows], codes_of(path)
    assert errors["torch-cpu"] == pytest.approx(errors["cpu"], rel=0.02)
    assert codes["torch-cpu"].keys() == codes["cpu"].keys()
    assert len(errors["cpu"]) == len(codes["cpu"]) > 3
    assert all(np.mean(array == codes["torch-cpu"][name]) > 0.95 for name, array in codes["cpu"].items())


@needs_torch
@pytest.mark.slow
def test_experts_are_as_good_as_numpys() -> None:
    errors = []
    for device in ("cpu", "torch-cpu"):
        report = magr_onnx.optimize(experts(form_of("swiglu")), batches(30), device=device, progress=None).report
        errors.append([row.error for row in report.layers])
        assert any("linear layers were solved on" in note for note in report.notes) == (device == "torch-cpu")
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[0]


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"quantizer": "gptq", "bits": 3}, 0.97),
        ({"effort": "fast", "bits": 3}, 0.95),
        ({"effort": "balanced", "bits": 3}, 0.3),  # error feedback enlarges what differs in one code
    ],
)
def test_the_file_is_as_good_as_numpys(options: dict[str, Any], same: float, tmp_path: Path) -> None:
    divergences, codes = {}, {}
    for device in ("cpu", "torch-cpu"):
        path = tmp_path / f"{device}.onnx"
        report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=path, device=device, progress=None, **options).report
        checked = magr_onnx.validate(bundled.MODEL, path, few_samples(bundled.HELD_OUT), layers=False, latency=False)
        divergences[device], codes[device] = next(iter(checked.arithmetics.values()))[0].kl, codes_of(path)
        solved = [note for note in report.notes if note.startswith("linear layers were solved on device torch-cpu (torch on the CPU)")]
        assert len(solved) == (device == "torch-cpu")
    assert divergences["torch-cpu"] == pytest.approx(divergences["cpu"], rel=0.05)
    assert codes["torch-cpu"].keys() == codes["cpu"].keys()
    assert codes["cpu"]
    equal = [np.mean(array == codes["torch-cpu"][name]) for name, array in codes["cpu"].items()]
    assert np.mean(equal) > same


@needs_torch
@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in ({"format": "qdq-int8"}, {"low_rank": 4, "beta": 1.0}))]
)
def test_nothing_of_numpy_meets_an_array_of_torch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU that works, and on a GPU it fails; so does a new array that is not given a device."""
    import torch
    from torch.overrides import TorchFunctionMode

    met: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, given = getattr(function, "__name__", str(function)), dict(kwargs or {})
            values = [part for value in (*args, *given.values()) for part in (value if isinstance(value, tuple | list) else [value])]
            foreign = [v for v in values if isinstance(v, np.ndarray | np.generic) and not isinstance(v, np.integer)]
            if name == "__array__" or (foreign and name != "from_numpy"):
                met.add(name)
            if name in FACTORIES and given.get("device") is None:
                met.add(f"{name} without a device")
            calls.append(name)
            return function(*args, **given)

    monkeypatch.setattr(threads, "count", lambda: 1)  # a mode is of one thread
    backends.find("torch-cpu")
    calls: list[str] = []
    data = [{"x": np.random.default_rng(i).standard_normal((16, 32), np.float32)} for i in range(8)]
    with Watch():
        torch.ones(1, device="cpu") + np.float64(1)
        assert met == {"add"}  # it sees what it is to see
        met.clear()
        magr_onnx.optimize(deep(2), data, device="torch-cpu", progress=None, **options)
    assert not met
    assert len(calls) > 1000


@needs_torch
def test_without_data_nothing_is_solved_there_and_the_report_says_so() -> None:
    here, there = (magr_onnx.optimize(chain(), device=device, progress=None) for device in ("cpu", "torch-cpu"))
    assert [note for note in there.report.notes if note not in here.report.notes] == [
        "nothing was solved on device torch-cpu (torch on the CPU): only linear layers with calibration data are; all others are solved on "
        "the CPU"
    ]
    arrays = [{name: value.const_value.numpy().tobytes() for name, value in o.model.graph.initializers.items()} for o in (here, there)]
    assert arrays[0] == arrays[1]


@needs_torch
def test_workers_have_no_device() -> None:
    with pytest.raises(OptionError, match="device torch-cpu and workers"):
        magr_onnx.optimize(chain(), device="torch-cpu", workers=2)


def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="device 'gpu' is not known"):
        magr_onnx.optimize(tmp_path / "no_model.onnx", device="gpu")
