"""Output channels of one layer, solved by several workers of dask.distributed: by those that have no layer to solve.

The worker that has the layer takes blocks of output channels from the front; each of its helpers, once it is free, one after the other from
the back. So nobody waits for a helper that is busy, and what a helper had that died is done by the worker that has the layer. Every block
is the same function of the same arrays, whoever computes it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from magr_onnx.core import threads

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 2.0  # seconds to wait for a block before it is asked whether its helper is alive


class Helpers:
    """Other workers, for `magr_onnx.core.threads.helped`, in a task of a worker."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Have help from the workers at ``addresses``."""
        import distributed

        self._client: Any = distributed.get_client()
        self._addresses = addresses

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> list[R]:
        """Return ``function`` of every item, in order.

        Raises:
            BaseException: What the function raises.
        """
        work = _Work(self._client, function, items)
        try:
            return work.done(self._addresses)
        finally:
            work.close()


class _Work(Generic[T, R]):
    """Blocks on their way: who has which."""

    def __init__(self, client: Any, function: Callable[[T], R], items: Sequence[T]) -> None:
        self._client, self._function, self._items = client, function, items
        self._data = client.scatter(function, hash=False)  # it stays in this worker, where helpers fetch it
        self._waiting = deque(range(len(items)))
        self._results: dict[int, R] = {}
        self._with: dict[str, tuple[int | None, Any]] = {}  # the block that every helper has, and its future
        self._changed = threading.Condition()

    def done(self, addresses: Sequence[str]) -> list[R]:
        """Do the work with helpers at ``addresses``."""
        for address in addresses:
            self._submit(address, None, -1, _ready)  # behind the layers that it has
        while True:
            with self._changed:
                in_time = self._changed.wait_for(lambda: self._waiting or len(self._results) == len(self._items), PATIENCE)
                index = self._waiting.popleft() if self._waiting else None
            if index is not None:
                self._results[index] = self._function(self._items[index])
            elif in_time:
                return [self._results[index] for index in range(len(self._items))]
            else:
                self._take_back()

    def close(self) -> None:
        """Hand out no more blocks."""
        with self._changed:
            self._waiting.clear()
            self._with.clear()

    def _take_back(self) -> None:
        """Take back the blocks of helpers that are dead."""
        alive = self._client.nthreads()
        with self._changed:
            for address in [address for address in self._with if address not in alive]:
                index, _ = self._with.pop(address)
                if index is not None:
                    self._waiting.append(index)

    def _submit(self, address: str, index: int | None, priority: int, function: Callable[..., Any], *arguments: Any) -> None:
        future = self._client.submit(function, *arguments, workers=[address], pure=False, priority=priority)
        self._with[address] = index, future
        future.add_done_callback(partial(self._finished, address))

    def _finished(self, address: str, future: Any) -> None:
        """Take what a helper has done, and give it the next block; called in a thread of its own."""
        is_done = future.status == "finished"
        result: Any = future.result() if is_done else None
        with self._changed:
            index, known = self._with.get(address, (None, None))
            if known is not future:  # this work is over, or the helper was taken for dead
                return
            del self._with[address]
            if index is not None and is_done:
                self._results[index] = result
            elif index is not None:  # this worker meets the same error, if it is one of the layer
                self._waiting.append(index)
            if self._waiting and is_done:
                block = self._waiting.pop()
                self._submit(address, block, 1, _call, self._data, self._items[block])  # before layers that came meanwhile
            self._changed.notify()


def _ready() -> None:
    """Return as soon as a helper is free."""


def _call(function: Callable[[T], R], item: T) -> R:
    threads.one_blas_thread()
    return function(item)
