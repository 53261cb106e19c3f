"""Tests of the loss of a model, where outputs are not finite; its values elsewhere are tested with the budgets that use it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from magr_onnx.runtime.data.sources import open_source
from magr_onnx.runtime.measure.loss import COSINE, KL, Reference
from magr_onnx.runtime.ort.session import Session

ROWS = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def loss(name: str, expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]) -> tuple[str, float]:
    text = f"""<ir_version: 10, opset_import: ["": 17]> g (float[n, 5] x) => (float[n, 5] {name}) {{ {name} = Identity(x) }}"""
    with Session(ir.serde.deserialize_model(onnx.parser.parse_model(text))) as session:
        reference = Reference(session, open_source([{"x": expected}], session.inputs, 3))
    return reference.metric, reference.loss(lambda batch: [actual])


@pytest.mark.parametrize("name", ["logits", "y"])
@pytest.mark.parametrize("masked", [-np.inf, np.nan])
def test_what_is_not_finite_in_the_float_model_does_not_count(name: str, masked: float) -> None:
    """The others are compared as if it were not there (infinities), or but for its row (NaN in logits)."""
    expected, actual = ROWS.copy(), ROWS[::-1].copy()
    expected[:, 2] = actual[:, 2] = masked
    metric, found = loss(name, expected, actual)
    rest = [0, 1, 3, 4]
    a, b = expected[:, rest].astype(np.float64), actual[:, rest].astype(np.float64)
    if metric == COSINE:
        cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found == pytest.approx(1 - cosines.mean())
    elif masked == -np.inf:
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
        assert (metric, found) == (KL, pytest.approx((p * np.log(p / q)).sum(axis=1).mean()))
    else:
        assert found == 0


@pytest.mark.parametrize("name", ["logits", "y"])
@pytest.mark.parametrize("wrong", [-np.inf, np.inf, np.nan])
def test_what_is_not_finite_in_the_other_model_alone_is_an_infinite_loss(name: str, wrong: float) -> None:
    actual = ROWS.copy()
    actual[1, 3] = wrong
    assert loss(name, ROWS, actual)[1] == np.inf
