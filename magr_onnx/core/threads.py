"""Independent work on all cores: threads that share one job, in products of one thread each.

NumPy releases the interpreter in products, so that large ones, and layers, run at the same time; threads that go row by row through
blocks of output channels wait for it more than they gain. The threads of a BLAS spin while they wait for each other: beside another busy
process that slows the solvers several times. What a job is cut into depends on its shape, never on the number of threads, so that results
are the same bytes on any machine with the same BLAS.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from magr_onnx.core.gram import Array

T = TypeVar("T")
R = TypeVar("R")

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def count() -> int:
    """Return the number of threads: the `cores`, or fewer by the quota of the process's container, or by OMP_NUM_THREADS."""
    threads = cores()
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        threads = min(threads, math.ceil(int(quota) / int(period)))  # "max": no quota
    with contextlib.suppress(KeyError, ValueError):
        threads = min(threads, int(os.environ["OMP_NUM_THREADS"]))
    return max(threads, 1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(count() - 1, 1), "onnx-magr")


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Let every product run in the thread that asks for it."""
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def one_blas_thread() -> None:
    """Let every product of this process run in the thread that asks for it, from now on."""
    ThreadpoolController().limit(limits=1, user_api="blas")


_WIDTH = 512  # columns of a product, or rows of a narrow one, that a thread computes at a time
_LEAST = 1 << 26  # multiplications of a product that threads share: to wake them takes as long as some millions


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return ``a b`` of ``a (m, k)`` and ``b (k, n)``, into ``out (m, n)`` if that is given; threads share a large one."""
    result = np.empty((len(a), b.shape[1]), np.result_type(a, b)) if out is None else out
    if len(a) * b.size < _LEAST or max(result.shape) < 2 * _WIDTH:
        return np.matmul(a, b, out=result)

    def columns(start: int) -> None:
        np.matmul(a, b[:, start : start + _WIDTH], out=result[:, start : start + _WIDTH])

    def rows(start: int) -> None:
        np.matmul(a[start : start + _WIDTH], b, out=result[start : start + _WIDTH])

    if b.shape[1] >= 2 * _WIDTH:
        each(columns, range(0, b.shape[1], _WIDTH))
    else:
        each(rows, range(0, len(a), _WIDTH))
    return result


class Share(Protocol):
    """Work that others help with."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> list[R]:
        """Return ``function`` of every item, in order."""


_share: ContextVar[Share | None] = ContextVar("share", default=None)


@contextlib.contextmanager
def helped(share: Share) -> Iterator[None]:
    """Have the output channels of layers that this thread solves shared with others, beside its own threads."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def shared(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return ``function`` of every item, in order, by whoever helps (`helped`), else by `each`."""
    share = _share.get()
    return each(function, items) if share is None or len(items) < 2 else share(function, items)


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``function`` of every item, in order.

    The calling thread works, too, and waits for no job that has not begun, so that a function may call this again.

    Raises:
        BaseException: What the function raises, once no other thread is at work on this.
    """
    jobs, results = list(items), dict[int, R]()
    waiting = iter(range(len(jobs)))  # `next` of it is atomic

    def work() -> None:
        for index in waiting:
            try:
                results[index] = function(jobs[index])
            except BaseException:
                for _ in waiting:  # nobody begins another
                    pass
                raise

    helpers = [_pool().submit(work) for _ in range(min(count(), len(jobs)) - 1)]
    try:
        work()
    finally:
        failures = [error for helper in helpers if not helper.cancel() and (error := helper.exception()) is not None]
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(jobs))]
