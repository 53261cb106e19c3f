"""The user's own measure: scripts and functions, what they are called with, what is said of those that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.errors import OptionError
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.measure.metric import Judge, Metric, Predictions
from magr_onnx.runtime.ort.session import Session, inputs_of
from tests import graphs
from tests.graphs import Array, Builder, random


def classifier(batch: int | str = "batch") -> ir.Model:
    """Scores of 5 classes."""
    b = Builder()
    return b.model(b.node("MatMul", [b.input("x", [batch, 32]), b.constant("w", random(32, 5))], "head"), [batch, 5], "scores")


def expected(model: ir.Model, x: Array) -> Array:
    """What onnxruntime alone computes, one sample at a time, with the batch dimension of the model left open."""
    proto = graphs.proto(model)
    weight = np.frombuffer(proto.graph.initializer[0].raw_data, np.float32).reshape(32, 5)
    return np.stack([row @ weight for row in x])


@pytest.mark.parametrize("batch", ["batch", 4, 5])
@pytest.mark.parametrize("samples", [3, 11, 43])
def test_predictions_are_every_sample_once_in_the_order_of_the_data(batch: int | str, samples: int) -> None:
    """Also where batches of a fixed size are filled with repeated samples, and stand in another order."""
    model, x = classifier(batch), random(samples, 32, seed=1)
    for source in ({"x": x}, [{"x": x[:2]}, {"x": x[2:]}]):
        with Session(model) as session:
            predictions = Predictions(session, open_data(source, inputs_of(model), 4))
            for _ in range(2):  # every loop runs the model again
                batches = list(predictions)
                assert len(batches) == len(predictions)
                np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), x)
                np.testing.assert_allclose(np.concatenate([batch["scores"] for batch in batches]), expected(model, x), rtol=1e-4, atol=1e-5)


def _value(function: Callable[[Predictions], Any]) -> float:
    model = classifier()
    return Metric.of(function).value(model, open_data({"x": random(8, 32)}, inputs_of(model)))


@pytest.mark.parametrize("number", [0.5, 1, np.float32(0.25), np.array(0.75), -3])
def test_numbers(number: Any) -> None:
    assert _value(lambda predictions: number) == float(np.ravel(number)[0])


@pytest.mark.parametrize("value", [None, "0.9", True, np.bool_(True), [0.5], np.ones(2), 1j, {}])
def test_what_is_no_number_is_refused(value: Any) -> None:
    def accuracy(predictions: Predictions) -> Any:
        return value

    with pytest.raises(OptionError, match=r"metric accuracy: expected a number, found "):
        _value(accuracy)


def test_a_failing_function_is_named_with_its_line_and_what_it_gets() -> None:
    def accuracy(predictions: Predictions) -> float:
        return float(next(iter(predictions))["logits"].mean())

    with pytest.raises(OptionError, match=r"metric accuracy: KeyError: 'logits' \(line \d+ of test_metric.py\).*scores, x"):
        _value(accuracy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_float_model_needs_a_finite_number(value: float) -> None:
    model = classifier()
    with pytest.raises(OptionError, match="expected a finite number for the float model"):
        Judge.of(
            Metric("accuracy", "accuracy.py:accuracy", lambda _: value), model, open_data({"x": random(8, 32)}, inputs_of(model)), "cpu"
        )


ONE = "from math import sqrt\nimport beside\n\ndef _own():\n    return sqrt(4)\n\ndef top1(predictions):\n    return beside.HALF * _own()\n"
SEVERAL = "def a(p):\n    return 1\n\ndef b(p):\n    return 2\n"


@pytest.mark.parametrize(
    ("text", "named", "name", "value"),
    [(ONE, "", "top1", 1), (ONE, ":top1", "top1", 1), (SEVERAL, ":b", "b", 2), (SEVERAL + "metric = b\n", "", "metric", 2)],
)
def test_scripts(text: str, named: str, name: str, value: float, tmp_path: Path) -> None:
    """The only function, that called metric, or the one that is named; what it imports may lie beside it."""
    script = tmp_path / "measure.py"
    script.write_text(text)
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    metric = Metric.of(f"{script}{named}")
    assert metric.name == name
    model = classifier()
    assert metric.value(model, open_data({"x": random(8, 32)}, inputs_of(model))) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "no such file"),
        ("measure.txt", "x", "a Python script"),
        ("measure.py", "x = 1\n", "it has no function"),
        ("measure.py", SEVERAL, "and it has a, b; name one: .*measure.py:NAME"),
        ("measure.py:c", SEVERAL, "has no function c; it has a, b"),
        ("measure.py", "\nimport nothing_of_this_name\n", r"the script failed: ModuleNotFoundError: .* \(line 2 of measure.py\)"),
        ("measure.py", "def a(:\n", "the script failed: SyntaxError"),
        ("measure.py", "raise SystemExit(2)\n", "the script failed: SystemExit"),
    ],
)
def test_scripts_that_cannot_be_used(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(OptionError, match=message):
        Metric.of(str(tmp_path / name))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(OptionError, match="give a function of predictions, or a script"):
        Metric.of(3)  # type: ignore[arg-type]
