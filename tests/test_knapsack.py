"""The multiple-choice knapsack against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magr_onnx.knapsack import Item, Point, best, curve, least_cost, least_loss, point, smallest, undominated
from tests.helpers import EXAMPLES

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**6)), min_size=1, max_size=4).map(
        lambda pairs: Item(np.array([float(c) for c, _ in pairs]), np.array([loss * 1e-7 for _, loss in pairs]))
    ),
    min_size=1,
    max_size=5,
)


def everything(items: list[Item]) -> list[Point]:
    return [point(items, choices) for choices in itertools.product(*(range(len(item.costs)) for item in items))]


@EXAMPLES
@given(ITEMS, st.floats(0, 1))
def test_least_loss_is_the_least(items: list[Item], share: float) -> None:
    low, high = smallest(items).cost, best(items).cost
    bound = float(np.floor(low + share * (high - low)))
    found = least_loss(items, bound)
    assert found is not None
    assert found.cost <= bound
    oracle = min(p.loss for p in everything(items) if p.cost <= bound)
    assert found.loss <= oracle + 2e-6 * max(p.loss for p in everything(items))


@EXAMPLES
@given(ITEMS, st.floats(0, 1))
def test_least_cost_is_the_least(items: list[Item], share: float) -> None:
    low, high = best(items).loss, smallest(items).loss
    bound = low + share * (high - low)
    found = least_cost(items, bound)
    assert found is not None
    assert found.loss <= bound
    within = [p for p in everything(items) if p.loss <= bound]
    assert found.cost <= min(p.cost for p in within) + 2e-6 * max(p.cost for p in everything(items))


@EXAMPLES
@given(ITEMS)
def test_curve_is_every_supported_optimum(items: list[Item]) -> None:
    points = curve(items)
    tried = everything(items)
    assert [p.cost for p in points] == sorted({p.cost for p in points})
    assert points[0].cost == smallest(items).cost
    assert points[-1].loss == pytest.approx(best(items).loss, abs=1e-12)
    for p in points:
        assert p.loss <= min(q.loss for q in tried if q.cost <= p.cost) + 1e-12
    if len(points) > 1:  # no choice of any price lies below the curve
        costs, losses = [p.cost for p in points], [p.loss for p in points]
        for q in tried:
            assert q.loss >= np.interp(q.cost, costs, losses) - 1e-9


@EXAMPLES
@given(ITEMS)
def test_undominated_choices_trade(items: list[Item]) -> None:
    for item in items:
        kept = undominated(item)
        assert (np.diff(item.costs[kept]) > 0).all()
        assert (np.diff(item.losses[kept]) < 0).all()
        for j in range(len(item.costs)):
            assert any(item.costs[i] <= item.costs[j] and item.losses[i] <= item.losses[j] for i in kept)


def test_what_cannot_be_met_is_none() -> None:
    items = [Item(np.array([3.0, 5.0]), np.array([2.0, 1.0]))] * 2
    assert least_loss(items, 5) is None
    assert least_cost(items, 1.9) is None
    assert least_loss(items, 6) == Point((0, 0), 6, 4)
    assert least_cost(items, 2) == Point((1, 1), 10, 2)


def test_a_model_of_many_layers_is_solved() -> None:
    """300 layers of 13 choices, as close to a tie as real ones: a feasible answer that no point of the curve beats."""
    rng = np.random.default_rng(0)
    items = []
    for _ in range(300):
        bits = np.sort(rng.uniform(2, 10, 13))
        items.append(Item(np.floor(bits * 1e5), rng.lognormal(0, 2) * 4.0**-bits))
    bound = 5.125e5 * 300
    found = least_loss(items, bound)
    assert found is not None
    assert found.cost <= bound
    below = max((p for p in curve(items) if p.cost <= bound), key=lambda p: p.cost)
    above = min((p for p in curve(items) if p.cost >= bound), key=lambda p: p.cost)
    assert above.loss <= found.loss <= below.loss


@pytest.mark.parametrize(("costs", "losses"), [([], []), ([1.0], [1.0, 2.0]), ([np.inf], [0.0]), ([1.0], [np.nan])])
def test_items_are_checked(costs: list[float], losses: list[float]) -> None:
    with pytest.raises(ValueError, match="costs"):
        Item(np.array(costs), np.array(losses))
