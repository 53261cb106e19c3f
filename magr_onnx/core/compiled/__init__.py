"""Inner loops of the solvers, compiled by Numba where it is installed (extra ``fast``).

NumPy goes through a layer row by row: a dozen calls for each, and as many passes over memory. Compiled, a panel of rows is done for a few
output channels that stay in cache, and blocks of channels are done in threads that do not wait for each other. The loops in NumPy, in the
files of the methods, are what these are tested against; the results differ where rounding errors of sums decide between two codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import TypeVar

from magr_onnx.core import threads
from magr_onnx.core.backends import HOST, Backend
from magr_onnx.core.types import column_parts

T = TypeVar("T")

LEAST_WEIGHTS, LEAST_CHANNELS = 1 << 15, 64  # of a layer: smaller ones take less time than to load the compiler, and its 100 MB
CHANNELS = 512  # output channels that a thread solves at a time, about


@functools.cache
def available() -> bool:
    """Return whether Numba is installed and works with this NumPy."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:  # a version that does not know this NumPy
        return False
    return True


def processor() -> tuple[str, ...]:
    """Return the name of the processor that loops are compiled for, which decides how sums are rounded; none without Numba."""
    if not available():
        return ()
    from llvmlite.binding import get_host_cpu_name

    return (str(get_host_cpu_name()),)


def serves(k: int, n: int, *, backend: Backend = HOST) -> bool:
    """Return whether the loops of a layer ``(k, n)`` are compiled ones. It depends on its shape, not on the machine's cores."""
    return backend.compiles and k * n >= LEAST_WEIGHTS and n >= LEAST_CHANNELS and available()


def by_columns(function: Callable[[slice], T], k: int, n: int, *, backend: Backend = HOST) -> list[T]:
    """Return ``function`` of slices of the output channels of a layer ``(k, n)``, which are independent; it changes nothing but its result.

    Compiled, they are solved in threads, or by whoever helps this one (`magr_onnx.core.threads.helped`);
    else large ones one after the other, since temporaries may be many times the layer.
    """
    if not serves(k, n, backend=backend):
        return [function(part) for part in column_parts(k, n, most=backend.column_bytes)]
    count = max(1, min(n // CHANNELS, k * n // LEAST_WEIGHTS))  # so that compiled loops serve every slice
    edges = [n * i // count for i in range(count + 1)]
    return threads.shared(function, [slice(a, b) for a, b in pairwise(edges)])
