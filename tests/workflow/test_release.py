"""Statistics live as long as layers need them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import magr_onnx
from magr_onnx.core.types import LayerStats
from magr_onnx.workflow import layer_round
from tests.graphs import Builder, K, N, random


def test_what_is_known_of_an_input_goes_with_the_last_layer_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of three inputs, two each: never more than two of them are alive while layers are finished one by one."""
    b = Builder()
    x, outputs = b.input("x", ["batch", K]), []
    for i in range(3):
        y = b.node("Tanh" if i else "Relu", [x], f"input_{i}") if i < 2 else x
        outputs += [b.node("MatMul", [y, b.constant(f"w{i}{j}", random(K, N, seed=2 * i + j))], f"layer_{i}{j}") for j in range(2)]
    for output in outputs:
        output.shape = None
    model = b.model_of(outputs)
    given: dict[str, weakref.ref[np.ndarray]] = {}
    alive = []
    known, finish = layer_round._known, layer_round.Round.finish

    def noted(stats: dict[str, LayerStats], layer: layer_round.LinearLayer) -> LayerStats | None:
        found = known(stats, layer)
        assert found is not None
        given[layer.reads] = weakref.ref(found.gram)
        return found

    def counted(self: layer_round.Round, context: layer_round.RunContext, solved: layer_round.SolvedLayer) -> None:
        finish(self, context, solved)
        gc.collect()
        alive.append([name for name, gram in given.items() if gram() is not None])

    monkeypatch.setattr(layer_round, "_known", noted)
    monkeypatch.setattr(layer_round.Round, "finish", counted)
    feeds = [{"x": np.random.default_rng(s).standard_normal((16, K), np.float32)} for s in range(4)]
    magr_onnx.optimize(model, feeds, effort="fast")
    assert len(given) == 3
    assert len(alive) == 6
    assert max(map(len, alive)) <= 2
