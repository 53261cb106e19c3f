"""The multiple-choice knapsack: one choice for every item, at the least loss within a cost, or the least cost within a loss.

With ``x_ij = 1`` where item ``i`` takes choice ``j``, of cost ``c_ij`` and loss ``l_ij``,

    argmin  sum_ij l_ij x_ij   subject to   sum_ij c_ij x_ij <= C,   sum_j x_ij = 1,   x_ij in {0, 1}

or with costs and losses exchanged. The linear relaxation (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research
27(3), 1979) gives a multiplier ``m`` and a bound ``B = sum_i min_j (l_ij + m c_ij) - m C``, and any solution is

    sum l_ij x_ij = B + sum r_ij x_ij + m (C - sum c_ij x_ij),     r_ij = l_ij + m c_ij - min_j (l_ij + m c_ij) >= 0,

so one better than the best known, ``U``, has ``sum r_ij x_ij < U - B``: dynamic programming over items, of states on the Pareto front of
cost and loss, needs to keep those only (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83(2), 1995).
The bound closes in fast, since every state, completed as the relaxation would, is a solution. The result is within `GAP` of the least.

A general mixed-integer solver (HiGHS) gives the same answers, but ten to a hundred times slower, with a constraint that holds within a
tolerance, and it prints to standard output, where a report may go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

GAP = 1e-6
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One item to choose for.

    Attributes:
        costs: ``(J,)`` of every choice, whole numbers.
        losses: ``(J,)`` of every choice.
    """

    costs: Numbers
    losses: Numbers

    def __post_init__(self) -> None:
        if self.costs.shape != self.losses.shape or self.costs.ndim != 1 or not len(self.costs):
            raise ValueError(f"an item needs as many costs as losses, at least one; got {self.costs.shape} and {self.losses.shape}")
        if not (np.isfinite(self.costs).all() and np.isfinite(self.losses).all()):
            raise ValueError("costs and losses must be finite")


@dataclass(frozen=True, slots=True)
class Point:
    """A choice for every item, with its cost and loss."""

    choices: tuple[int, ...]
    cost: float
    loss: float


def point(items: Sequence[Item], choices: Sequence[int]) -> Point:
    """Compute the cost and loss of ``choices``."""
    cost = sum(float(item.costs[j]) for item, j in zip(items, choices, strict=True))
    loss = sum(float(item.losses[j]) for item, j in zip(items, choices, strict=True))
    return Point(tuple(int(j) for j in choices), cost, loss)


def smallest(items: Sequence[Item]) -> Point:
    """Return the point of least cost, and of least loss among those."""
    return point(items, [int(np.lexsort((item.losses, item.costs))[0]) for item in items])


def best(items: Sequence[Item]) -> Point:
    """Return the point of least loss, and of least cost among those."""
    return point(items, [int(np.lexsort((item.costs, item.losses))[0]) for item in items])


def least_loss(items: Sequence[Item], cost: float) -> Point | None:
    """Minimise the loss within a cost; None where even `smallest` costs more."""
    return _solve(items, cost, "cost")


def least_cost(items: Sequence[Item], loss: float) -> Point | None:
    """Minimise the cost within a loss; None where even `best` loses more."""
    return _solve(items, loss, "loss")


def curve(items: Sequence[Item]) -> list[Point]:
    """Trace the trade-off from `smallest` to `best`, in rising cost: all optima of ``loss + lambda cost`` for any ``lambda > 0``.

    Each is the least loss at its cost, exactly. Between neighbours, `least_loss` lies on or above the line that joins them.
    """
    costs, losses = [item.costs for item in items], [item.losses for item in items]
    return [point(items, choices) for choices, _ in _path(costs, losses)]


def _front(weights: Numbers, values: Numbers) -> list[int]:
    """Return the indices of the Pareto front, in rising weight and falling value."""
    order = np.lexsort((values, weights))
    falling = values[order]
    undominated = np.ones(len(order), bool)
    undominated[1:] = falling[1:] < np.minimum.accumulate(falling)[:-1]
    positions: list[int] = order[undominated].tolist()
    return positions


def _hull(weights: Numbers, values: Numbers) -> list[int]:
    """Return the indices of `_front` on the lower convex hull."""
    hull: list[int] = []
    for c in _front(weights, values):
        while len(hull) > 1:
            a, b = hull[-2:]
            chord = (values[c] - values[a]) * (weights[b] - weights[a])
            if (values[b] - values[a]) * (weights[c] - weights[a]) < chord:
                break
            hull.pop()
        hull.append(c)
    return hull


def _path(weights: Sequence[Numbers], values: Sequence[Numbers]) -> Iterator[tuple[list[int], float]]:
    """Yield the integral solutions of the linear relaxation in rising weight, each with the slope of the step that led to it."""
    hulls = [_hull(w, v) for w, v in zip(weights, values, strict=True)]
    steps = []
    for i, hull in enumerate(hulls):
        for position, (j, k) in enumerate(pairwise(hull), 1):
            steps.append(((values[i][k] - values[i][j]) / (weights[i][k] - weights[i][j]), i, position))
    chosen = [hull[0] for hull in hulls]
    yield list(chosen), -np.inf
    for slope, i, position in sorted(steps):  # slopes of one item rise along its hull, so its steps come in order
        chosen[i] = hulls[i][position]
        yield list(chosen), float(slope)


def _solve(items: Sequence[Item], bound: float, bounded: str) -> Point | None:
    """Minimise one quantity with the other, ``bounded``, at most ``bound``."""
    weights, values = [item.costs for item in items], [item.losses for item in items]
    if bounded == "loss":
        weights, values = values, weights
    greedy: list[int] | None = None
    for choices, slope in _path(weights, values):
        if getattr(point(items, choices), bounded) > bound:
            if greedy is None:
                return None
            improved = point(items, _improve(weights, values, greedy, -slope, bound))
            if getattr(improved, bounded) <= bound:  # sums in another order may differ in the last digit
                return improved
            break
        greedy = choices
    return None if greedy is None else point(items, greedy)


def _improve(weights: Sequence[Numbers], values: Sequence[Numbers], greedy: Sequence[int], multiplier: float, bound: float) -> list[int]:
    """Improve the relaxation's choices by dynamic programming; see the module."""
    reduced = [v + multiplier * w for w, v in zip(weights, values, strict=True)]
    floors = [float(r.min()) for r in reduced]
    reduced = [r - floor for r, floor in zip(reduced, floors, strict=True)]
    below = sum(floors) - multiplier * bound
    order = sorted(range(len(weights)), key=lambda i: float(np.sort(reduced[i])[1:2].sum()))  # items that are nearly undecided first
    rest_weight = sum(float(weights[i][greedy[i]]) for i in order)
    rest_value = least = sum(float(values[i][greedy[i]]) for i in order)
    weight, value, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    stages: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []  # of every state: its predecessor and the choice made
    best_state = (0, 0)
    for stage, i in enumerate(order, 1):
        gap = least - below - GAP * abs(least)
        js = np.array([j for j in _front(weights[i], values[i]) if reduced[i][j] <= gap] or [greedy[i]])
        weight = np.add.outer(weight, weights[i][js]).ravel()
        value = np.add.outer(value, values[i][js]).ravel()
        excess = np.add.outer(excess, reduced[i][js]).ravel()
        possible = np.flatnonzero(excess <= gap)
        states = possible[_front(weight[possible], value[possible])]
        if not len(states):
            break
        weight, value, excess = weight[states], value[states], excess[states]
        stages.append((states // len(js), js[states % len(js)]))
        rest_weight -= float(weights[i][greedy[i]])
        rest_value -= float(values[i][greedy[i]])
        within = np.flatnonzero(weight + rest_weight <= bound)
        if len(within):
            top = int(within[np.argmin(value[within])])
            if value[top] + rest_value < least:
                least, best_state = float(value[top] + rest_value), (stage, top)
    chosen = list(greedy)
    stage, state = best_state
    for i, (parents, js) in reversed(list(zip(order, stages[:stage], strict=False))):
        chosen[i] = int(js[state])
        state = int(parents[state])
    return chosen
