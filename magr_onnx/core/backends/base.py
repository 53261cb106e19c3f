"""What solvers need from a library of arrays beyond the array API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Kind = Any
"""A type by its name, ``"float32"``, or as the array of the same backend has it."""


class Backend(ABC):
    """A library of arrays, and the device that they are on.

    Attributes:
        name: As the option ``device`` has it.
        described: The device in words, for reports.
        xp: The namespace with the functions of the array API.
        singular: What a factorization raises where a matrix is not positive definite.
        compiles: Whether loops compiled by Numba take its arrays.
        cached: Whether loops take what stays in a cache at a time; else all there is, in as few calls as possible.
        rint: ``rint(x, out=None)`` rounds to the nearest integers, ties to even. It and the next are in loops over rows.
        add_up: ``add_up(weights, rows, out)`` computes the sum of ``rows (p, N)``, each times its weight ``(p,)``, into ``out (N,)``.
        product: ``product(a, b, out=None)`` returns the matrix product ``a b``.
        column_bytes: Bytes of float32 output channels that a solver processes at a time; None for the usual.
    """

    name: str
    described: str
    xp: Any
    singular: type[Exception]
    compiles: bool
    cached: bool
    column_bytes: int | None
    rint: Any
    add_up: Any
    product: Any

    def part(self, cached: int, all_of_it: int) -> int:
        """Return how much a loop takes at a time: what stays in a cache, or all."""
        return cached if self.cached else max(all_of_it, 1)

    @abstractmethod
    def array(self, x: Array, kind: Kind = None) -> Array:
        """Return an array of NumPy on this device, in another type if that is given."""

    @abstractmethod
    def host(self, x: Array) -> Array:
        """Return an array in NumPy."""

    @abstractmethod
    def index(self, rows: npt.NDArray[np.intp]) -> Array:
        """Return row numbers in the form that arrays are indexed with."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], kind: Kind = "float32") -> Array:
        """Return a new array without values."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], kind: Kind = "float32") -> Array:
        """Return a new array of zeros."""

    @abstractmethod
    def copy(self, x: Array) -> Array:
        """Return a copy."""

    @abstractmethod
    def cast(self, x: Any, kind: Kind) -> Array:
        """Return an array in another type; itself where it has that type."""

    @abstractmethod
    def single(self, gram: Any) -> Any:
        """Return a matrix in float32, one row after the other; itself where it is so."""

    @abstractmethod
    def contiguous(self, x: Array, kind: Kind = None) -> Array:
        """Return an array whose rows follow one another in memory, in another type if that is given."""

    @abstractmethod
    def diagonal(self, x: Array) -> Array:
        """Return a view of the diagonals of matrices ``(..., K, K)``, through which they can be changed."""

    @abstractmethod
    def put(self, kept: Array, value: Array, where: Array) -> None:
        """Overwrite ``kept`` with ``value`` in the places that are marked."""

    @abstractmethod
    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        """Return ``einsum(subscripts, a, b)``, summed in float64."""

    @abstractmethod
    def inner(self, a: Array, b: Array) -> float:
        """Return the sum of all products of two arrays of one shape."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for all that was begun on the device."""

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute products of float32 in float32, not in TF32, while the block runs.

        Raises:
            MagrError: The device was out of memory.
        """
        yield
