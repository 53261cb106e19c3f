"""Orthogonal matrices whose products are fast and whose entries are all about as large: randomized Hadamard matrices and what replaces
them in other widths.

    Q = diag(signs) (F_1 (x) F_2 (x) ...) (I - 2 v v^T / |v|^2)

The factors are Hadamard matrices, scaled to be orthogonal: Sylvester's of powers of 2 and Paley's of ``q + 1`` and ``2 (q + 1)``, q prime.
An odd part that no Paley matrix takes up is a random orthogonal matrix, from the QR decomposition of a normal one. Random signs make them
incoherent with whatever the rows have in common (QuIP#, Tseng et al., arXiv 2402.04396; QuaRot, Ashkboos et al., arXiv 2404.00456).

The reflection is there where the vector of ones has to stay what it is, ``1 Q = 1`` and ``Q 1 = 1``: it takes ``1 diag(signs) (F_1 (x)
...)`` to 1. Such a rotation commutes with the subtraction of the mean of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from magr_onnx.core.types import Array

LARGEST_FACTOR = 512  # that powers of 2 are multiplied to: one product with it costs as much as a few small ones
MOST_PALEY = 256  # order up to which Hadamard matrices other than Sylvester's are looked for


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """An orthogonal matrix ``Q (K, K)``; see the module.

    Attributes:
        signs: ``(K,)`` of 1 and -1.
        factors: Orthogonal matrices whose orders have the product K.
        mirror: ``v (K,)``, or None for no reflection.
    """

    signs: Array
    factors: tuple[Array, ...]
    mirror: Array | None = None

    def of_rows(self, rows: Array) -> Array:
        """Return ``x Q`` float64 for every row ``x (K,)`` of ``rows (..., K)``."""
        orders = [len(factor) for factor in self.factors]
        result = (rows * self.signs).reshape(-1, *orders)
        for axis, factor in enumerate(self.factors, 1):
            result = np.moveaxis(np.moveaxis(result, axis, -1) @ factor, -1, axis)
        result = result.reshape(rows.shape)
        if self.mirror is not None:
            result -= (2 / (self.mirror @ self.mirror)) * (result @ self.mirror)[..., None] * self.mirror
        return result

    def of_columns(self, columns: Array) -> Array:
        """Return ``Q^T W`` float64 for ``columns W (K, N)``."""
        result: Array = np.ascontiguousarray(self.of_rows(np.ascontiguousarray(columns.T)).T)
        return result


def random_rotation(width: int, seed: int, keeps_ones: bool = False) -> Rotation:
    """Draw a rotation.

    Args:
        width: K.
        seed: Of the signs, and of what is no Hadamard matrix.
        keeps_ones: Whether the vector of ones is to stay what it is.
    """
    rng = np.random.default_rng(seed)
    odd = width // (width & -width)
    orders = [odd << i for i in range(2, (MOST_PALEY // odd).bit_length()) if width % (odd << i) == 0]
    hadamard = next((order for order in orders if odd > 1 and _paley(order) is not None), None)
    matrix = None if hadamard is None else _paley(hadamard)
    factors = [] if odd == 1 else [_orthogonal(odd, rng) if matrix is None else matrix / np.sqrt(len(matrix))]
    rest = width // (len(factors[0]) if factors else 1)
    while rest > 1:
        order = min(rest, LARGEST_FACTOR)
        factors.append(_sylvester(order) / np.sqrt(order))
        rest //= order
    rotation = Rotation(rng.choice([-1.0, 1.0], width), tuple(factors))
    if not keeps_ones or width == 1:
        return rotation
    return Rotation(rotation.signs, rotation.factors, rotation.of_rows(np.ones(width)) - 1)


def _orthogonal(order: int, rng: np.random.Generator) -> Array:
    """Draw an orthogonal matrix, uniformly (Mezzadri, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((order, order)))
    result: Array = q * np.sign(np.diagonal(r))
    return result


def _sylvester(order: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _paley(order: int) -> Array | None:
    """Return Paley's Hadamard matrix of an order that is a multiple of 4; None where neither construction has one."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 != remainder or not _is_prime(q):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = np.array([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
        core = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
        if remainder == 3:
            return _bordered(core, -1) + np.eye(order)
        conference = _bordered(core, 1)
        return np.kron(conference, np.array([[1.0, 1.0], [1.0, -1.0]])) + np.kron(np.eye(q + 1), np.array([[1.0, -1.0], [-1.0, -1.0]]))
    return None


def _bordered(core: Array, sign: int) -> Array:
    """Return a matrix with 0 in its corner, ones beside it, and ``sign`` below."""
    order = len(core) + 1
    matrix = np.zeros((order, order))
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, sign, core
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in itertools.takewhile(lambda d: d * d <= n, itertools.count(2)))
