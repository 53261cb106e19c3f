"""What solvers share that lower an error sweep by sweep: their result, when they stop, and how parts of a layer are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from magr_onnx.core.types import QuantizedWeight, sum_traces

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


def joined(parts: Sequence[Refined]) -> Refined:
    """Join the output channels of a layer that were refined in parts."""
    if len(parts) == 1:
        return parts[0]
    return Refined(QuantizedWeight.side_by_side([part.weight for part in parts]), tuple(sum_traces(*[part.errors for part in parts])))
