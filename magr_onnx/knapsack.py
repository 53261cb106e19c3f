"""The multiple-choice knapsack: one choice for every item, at the least loss within a size, or the least size within a loss.

With ``x_ij = 1`` where item ``i`` takes choice ``j``, of cost ``c_ij`` and loss ``l_ij``,

    argmin  sum_ij l_ij x_ij   subject to   sum_ij c_ij x_ij <= C,   sum_j x_ij = 1,   x_ij in {0, 1}

(Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27(3), 1979), or with costs and losses exchanged. Both are
solved by HiGHS as mixed-integer programs. Choices that cost and lose at least as much as another of their item are left out first.

HiGHS knows the constraint within a tolerance, so every answer is checked here in the caller's own numbers; where it does not hold, the
bound is lowered by what is too much and the program solved again. The objective is within `GAP` of the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GAP = 1e-6
_ATTEMPTS = 6
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One thing to choose for.

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
    """The cost and loss of some choices."""
    cost = sum(float(item.costs[j]) for item, j in zip(items, choices, strict=True))
    loss = sum(float(item.losses[j]) for item, j in zip(items, choices, strict=True))
    return Point(tuple(int(j) for j in choices), cost, loss)


def smallest(items: Sequence[Item]) -> Point:
    """The least cost there is, and the least loss at it."""
    return point(items, [int(np.lexsort((item.losses, item.costs))[0]) for item in items])


def best(items: Sequence[Item]) -> Point:
    """The least loss there is, and the least cost at it."""
    return point(items, [int(np.lexsort((item.costs, item.losses))[0]) for item in items])


def least_loss(items: Sequence[Item], cost: float) -> Point | None:
    """The least loss within a cost; None where even `smallest` costs more."""
    return _solve(items, cost, "cost")


def least_cost(items: Sequence[Item], loss: float) -> Point | None:
    """The least cost within a loss; None where even `best` loses more."""
    return _solve(items, loss, "loss")


def curve(items: Sequence[Item]) -> list[Point]:
    """The trade-off from `smallest` to `best`, in rising cost: all optima of ``loss + lambda cost`` for any ``lambda > 0``.

    Each is the least loss at its cost, exactly. Between two neighbours the optimum (`least_loss`) lies on or above the line that joins them.
    """
    hulls = [_hull(item) for item in items]
    at = [0] * len(items)
    steps = []
    for i, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        for position, (j, k) in enumerate(zip(hull, hull[1:], strict=False)):
            slope = (item.losses[k] - item.losses[j]) / (item.costs[k] - item.costs[j])
            steps.append((slope, i, position))
    found = [point(items, [hull[0] for hull in hulls])]
    for _, i, _ in sorted(steps):  # slopes of one item rise along its hull, so its steps come in order
        at[i] += 1
        found.append(point(items, [hull[p] for hull, p in zip(hulls, at, strict=True)]))
    return found


def undominated(item: Item) -> list[int]:
    """Choices no other one beats in cost without losing more, in rising cost and falling loss."""
    kept: list[int] = []
    for j in np.lexsort((item.losses, item.costs)):
        if not kept or item.losses[j] < item.losses[kept[-1]]:
            kept.append(int(j))
    return kept


def _hull(item: Item) -> list[int]:
    """The undominated choices on the lower convex hull, in rising cost."""
    hull: list[int] = []
    for j in undominated(item):
        while len(hull) > 1 and _above(item, hull[-2], hull[-1], j):
            hull.pop()
        hull.append(j)
    return hull


def _above(item: Item, a: int, b: int, c: int) -> bool:
    """Whether ``b`` lies on or above the line from ``a`` to ``c``."""
    rise = (item.losses[c] - item.losses[a]) * (item.costs[b] - item.costs[a])
    return bool((item.losses[b] - item.losses[a]) * (item.costs[c] - item.costs[a]) >= rise)


def _solve(items: Sequence[Item], bound: float, bounded: str) -> Point | None:
    """The least of one quantity with the other, ``bounded``, at most ``bound``."""
    floor = smallest(items) if bounded == "cost" else best(items)
    if getattr(floor, bounded) > bound:
        return None
    if not items:
        return floor
    kept = [undominated(item) for item in items]
    wanted = bound
    for _ in range(_ATTEMPTS):
        found = _program(items, kept, wanted, bounded)
        if found is None:
            break
        excess = getattr(found, bounded) - bound
        if excess <= 0:
            return found
        wanted -= excess
    return floor


def _program(items: Sequence[Item], kept: Sequence[Sequence[int]], bound: float, bounded: str) -> Point | None:
    """One program for HiGHS, everything relative to each item's least, so that numbers of any size fit its tolerances."""
    from scipy import sparse  # here, since the command line starts in half the time without it
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = ("losses", "costs") if bounded == "cost" else ("costs", "losses")
    objective, weight = (
        np.concatenate([_above_least(getattr(item, name)[list(k)]) for item, k in zip(items, kept, strict=True)]) for name in names
    )
    room = bound - sum(float(getattr(item, names[1])[list(k)].min()) for item, k in zip(items, kept, strict=True))
    if room < 0:
        return None
    owners = np.repeat(np.arange(len(items)), [len(k) for k in kept])
    one_each = sparse.csr_matrix((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    scale = max(float(weight.max()), 1e-300)
    result = milp(
        objective * (1e3 / max(float(objective.max()), 1e-300)),
        integrality=np.ones(len(owners)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None] / scale, -np.inf, room / scale)],
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        return None
    ends = np.cumsum([len(k) for k in kept])[:-1]
    return point(items, [k[int(np.argmax(x))] for k, x in zip(kept, np.split(result.x, ends), strict=True)])


def _above_least(values: Numbers) -> Numbers:
    result: Numbers = values - values.min()
    return result
