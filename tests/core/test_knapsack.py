"""The multiple-choice knapsack against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magr_onnx.core.knapsack import Item, Point, best, curve, least_cost, least_loss, point, smallest
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


def test_what_cannot_be_met_is_none() -> None:
    items = [Item(np.array([3.0, 5.0]), np.array([2.0, 1.0]))] * 2
    assert least_loss(items, 5) is None
    assert least_cost(items, 1.9) is None
    assert least_loss(items, 6) == Point((0, 0), 6, 4)
    assert least_cost(items, 2) == Point((1, 1), 10, 2)


def layers_like(count: int, seed: int) -> list[Item]:
    """Items as near to ties as those of a real model: a sensitivity and a size each, 15 choices of bits and blocks, and float."""
    rng = np.random.default_rng(seed)
    items = []
    for k, n in rng.choice([(256, 256), (256, 128), (256, 688), (688, 256)], count):
        sensitivity = rng.lognormal(0, 2)
        pairs = [(4.0 * k * n, 0.0)]
        for bits, block in itertools.product((2, 4, 8), (16, 32, 64, 128, 256)):
            groups = -(-k // block)
            loss = sensitivity * 4.0**-bits * (block / 32) ** 0.4 * rng.lognormal(0, 0.1)
            pairs.append((float(n * (groups * (block * bits // 8 + 4) - -groups * bits // 8)), loss))
        items.append(Item(np.array([c for c, _ in pairs]), np.array([loss for _, loss in pairs])))
    return items


@pytest.mark.parametrize("seed", range(3))
def test_like_a_mixed_integer_program(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """43 layers, against HiGHS (which also prints)."""
    from scipy.optimize import LinearConstraint, milp

    items = layers_like(43, seed)
    bound = float(np.floor(1.3 * smallest(items).cost))
    owner = np.repeat(np.arange(43), [len(item.costs) for item in items])
    costs, losses = (np.concatenate([getattr(item, name) for item in items]) for name in ("costs", "losses"))
    one_each = LinearConstraint(owner[None] == np.arange(43)[:, None], 1, 1)
    within = LinearConstraint(costs[None] / 1e4, -np.inf, bound / 1e4)
    whole = np.ones(len(owner))
    result = milp(losses * 1e3 / losses.max(), integrality=whole, bounds=(0, 1), constraints=[one_each, within])
    found = least_loss(items, bound)
    assert found is not None
    assert found.cost <= bound
    assert found.loss == pytest.approx(float(losses @ np.rint(result.x)), rel=3e-6)


@pytest.mark.parametrize("count", [1, 300])
def test_models_of_any_depth_are_solved(count: int) -> None:
    """A feasible answer between the neighbours on the curve; back from its loss to no higher cost."""
    items = layers_like(count, 7)
    bound = 1.4 * smallest(items).cost
    found = least_loss(items, bound)
    assert found is not None
    assert found.cost <= bound
    below = max((p for p in curve(items) if p.cost <= bound), key=lambda p: p.cost)
    above = min((p for p in curve(items) if p.cost >= bound), key=lambda p: p.cost)
    assert above.loss <= found.loss <= below.loss
    back = least_cost(items, found.loss)
    assert back is not None
    assert back.loss <= found.loss
    assert back.cost <= found.cost * (1 + 1e-6)


@pytest.mark.parametrize(("costs", "losses"), [([], []), ([1.0], [1.0, 2.0]), ([np.inf], [0.0]), ([1.0], [np.nan])])
def test_items_are_checked(costs: list[float], losses: list[float]) -> None:
    with pytest.raises(ValueError, match="costs"):
        Item(np.array(costs), np.array(losses))
