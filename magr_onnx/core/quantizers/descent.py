"""What solvers share that lower an error sweep by sweep: their result, when they stop, and wide layers a few columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from magr_onnx.core.types import Array, Columns, QuantizedWeight, sum_traces

State = TypeVar("State")


class Refined(NamedTuple):
    """A refined weight, and its error E at the start and after every sweep."""

    weight: QuantizedWeight
    errors: tuple[float, ...]

    @property
    def sweeps(self) -> int:
        return len(self.errors) - 1


def descend(
    start: State, sweep: Callable[[State, bool], State], error: Callable[[State], float], sweeps: int, tolerance: float
) -> tuple[State, tuple[float, ...]]:
    """Repeat ``sweep(state, last)`` until one lowers the error by less than a fraction; return the state and all errors."""
    state, errors = start, [error(start)]
    for remaining in reversed(range(sweeps)):
        state = sweep(state, remaining == 0)
        errors.append(error(state))
        if errors[-1] > (1 - tolerance) * errors[-2]:
            break
    return state, tuple(errors)


def by_columns(
    parts: Iterable[Columns], target: Array, start: QuantizedWeight, refine: Callable[[Array, QuantizedWeight], Refined]
) -> Refined:
    """Refine parts of the output channels, which are independent, one after the other: temporaries may be many times the layer."""
    refined = [refine(target[:, c], start.columns(c)) for c in parts]
    return Refined(QuantizedWeight.side_by_side([r.weight for r in refined]), tuple(sum_traces(*[r.errors for r in refined])))
