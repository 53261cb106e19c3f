"""What is made when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A model or data that is expensive to make: made only after everything that can be checked without it.

    Attributes:
        make: Makes it; called once by each consumer.
    """

    make: Callable[[], Any]
