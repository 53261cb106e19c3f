"""Layers solved by workers of dask.distributed (extra ``distributed``): processes on this machine, or on others.

A layer goes to the worker that has the fewest, with its weight and moments, and comes back as codes and scales. The statistics of an input
go to one worker, and from there to others that solve a layer with that input: once to each, which keeps what it computes from them for the
next such layer. Every layer is the pure function of its problem that it is in this process, and they are collected in order.

A worker that dies takes the data of its layers with it: problems are kept here until they are solved, and are sent again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from magr_onnx.core import compiled, threads
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.solution_arrays import Arrays, from_arrays, to_arrays
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import DependencyError, MagrError, OptionError, install, listed
from magr_onnx.passes.base import LayerStage, run_stages
from magr_onnx.report.data import versions
from magr_onnx.workflow.helpers import Helpers

START, CONNECT, GONE = 120.0, 10.0, 60.0  # seconds to wait for own workers, for a scheduler, and for workers in place of dead ones
MOST_SENT = 5  # times that a layer is sent: a worker that dies of it dies of it again
MOST_HELPERS = 8  # of a layer: wide ones have some tens of blocks
_SETTINGS = {"DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON": "{'MALLOC_TRIM_THRESHOLD_': None}"}
"""Of own workers. Dask's threshold has every array of some size mapped anew, which takes a fifth of the time of a layer."""
_NOTHING = LayerStats.data_free(1)
_RESUME = "; with resume, finished layers are kept"


@contextlib.contextmanager
def cluster(where: int | str) -> Iterator[Cluster]:
    """Start so many processes of one thread on this machine, or connect to the scheduler at that address, while the block runs.

    Raises:
        DependencyError: dask.distributed is not installed.
        MagrError: The processes do not start; there is no scheduler, or it has no workers; these lack the package or have other versions.
    """
    try:
        import distributed
    except ImportError as error:
        raise DependencyError(f"workers need dask.distributed, which is not installed; {install('distributed')}") from error
    connect: Any = distributed.Client
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(_processes(where)) if isinstance(where, int) else where
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that differ: `_check` says it
            try:
                client = stack.enter_context(connect(address, timeout=CONNECT, set_as_default=False))
            except (OSError, ValueError, TimeoutError) as error:
                raise MagrError(
                    f"no scheduler of dask answers at {address} ({error}); start one there (dask scheduler), or give a number of workers"
                ) from error
        try:
            client.wait_for_workers(1, timeout=CONNECT)
        except TimeoutError as error:
            raise MagrError(
                f"the scheduler at {address} has no workers; start some (dask worker {address} --nthreads 1 --nworkers N)"
            ) from error
        yield Cluster(client, direct=isinstance(where, int))


def address_of(workers: int | str) -> int | str:
    """Return a number of processes, or the address of a scheduler.

    Raises:
        OptionError: It is neither.
    """
    text = str(workers).strip()
    if text.isdecimal() and int(text):
        return int(text)
    scheme, _, place = text.partition("://")
    if scheme.isalpha() and ":" in place:
        return text
    raise OptionError(f"workers = {workers!r}: give a number of processes, or the address of a scheduler such as tcp://host:8786")


@contextlib.contextmanager
def _processes(count: int) -> Iterator[str]:
    """Run a scheduler in this process and so many workers of one thread in processes of their own; yield its address.

    Dask's own way to start workers imports the caller's script once more in each, which fails where its work is not guarded.
    """
    import distributed

    local: Any = distributed.LocalCluster
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx-magr-workers-", ignore_cleanup_errors=True))
        options = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}  # by itself it takes port 8787
        scheduler = stack.enter_context(local(n_workers=0, silence_logs=logging.CRITICAL, **options))
        arguments = ["--nworkers", str(count), "--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--local-directory", folder]
        command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler.scheduler_address, *arguments]
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | _SETTINGS)
        try:
            end = time.monotonic() + START
            while len(scheduler.scheduler.workers) < count:
                if process.poll() is not None or time.monotonic() > end:
                    raise MagrError(f"{count} workers did not start within {START:.0f} s; the end of their log:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield scheduler.scheduler_address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(slots=True, eq=False)
class _Shared:
    """Statistics that workers have, and how many layers there are now that need them."""

    stats: LayerStats
    data: Any
    layers: int = 0


class Cluster:
    """The workers of a scheduler, for `magr_onnx.passes.layerwise.run_layers`.

    Attributes:
        notes: Sentences for the report.
    """

    def __init__(self, client: Any, direct: bool) -> None:
        """Send layers by a ``client`` of dask, ``direct`` to the workers or through the scheduler."""
        self._here = _facts()
        self.notes = _check(client, self._here)
        self._client, self._direct = client, direct
        self._shared: dict[int, _Shared] = {}
        self._load: Counter[str] = Counter()  # unsolved layers of every worker

    @property
    def ahead(self) -> int:
        """Count the layers that are sent before the first of them is collected: two for every thread that there is by now."""
        return 2 * sum(self._threads().values())

    def send(self, name: str, stages: Sequence[LayerStage], problem: LayerProblem) -> Sent:
        """Have a worker solve a layer by stages of a plan, helped by others that are idle."""
        return Sent(self, name, stages, problem)

    def submit(self, stages: Sequence[LayerStage], problem: LayerProblem) -> tuple[str, Any]:
        """Send a problem; return the address of the worker and the future solution."""
        from distributed.client import ClosedClientError

        while True:
            address = self.emptiest()
            helpers = self._helpers(address)
            try:
                rest, shared = self._scatter(replace(problem, stats=_NOTHING), address), self._stats(problem.stats, address)
                function = partial(_solve, tuple(stages), helpers, self._here)
                future = self._client.submit(function, rest, shared.data, workers=[address], allow_other_workers=True, pure=False)
            except (OSError, TimeoutError, ClosedClientError):  # it has died meanwhile, or the scheduler has
                continue
            self._load[address] += 1
            shared.layers += 1
            return address, future

    def solved(self, address: str, problem: LayerProblem) -> None:
        """Take note that a layer is no longer with a worker."""
        self._load[address] -= 1
        shared = self._shared[id(problem.stats)]
        shared.layers -= 1
        if not shared.layers:
            del self._shared[id(problem.stats)]

    def emptiest(self) -> str:
        """Return the address of the worker with the fewest layers; wait for one where there is none.

        Raises:
            MagrError: There is none for `GONE` seconds.
        """
        end = time.monotonic() + GONE
        while not (threads := self._threads()):
            if time.monotonic() > end or self._client.status == "closed":  # as it is when it could not reach the scheduler again
                raise MagrError(
                    f"all workers have been gone for {GONE:.0f} s, or their scheduler is; start them, and run this again{_RESUME}"
                )
            time.sleep(0.2)
        return min(threads, key=lambda address: (self._load[address] / threads[address], address))

    def _helpers(self, address: str) -> list[str]:
        """Return the workers that help the one at ``address`` once they are idle.

        Only workers of one thread do: such a worker has a block of another's layer only if that layer had begun before its own, so that
        no two wait for each other.
        """
        threads = self._threads()
        others = sorted(threads.keys() - {address}, key=lambda other: (self._load[other], other))
        return others[:MOST_HELPERS] if set(threads.values()) == {1} else []

    def _threads(self) -> Mapping[str, int]:
        """Return the threads of every worker, by address; none where the scheduler does not answer."""
        if self._client.status == "closed":
            return {}
        try:
            threads: Mapping[str, int] = self._client.nthreads()
        except (OSError, TimeoutError, RuntimeError, AttributeError):  # the last one where it is being closed
            return {}
        return threads

    def _scatter(self, data: Any, address: str) -> Any:
        return self._client.scatter(data, workers=[address], direct=self._direct, hash=False)

    def _stats(self, stats: LayerStats, address: str) -> _Shared:
        """Return statistics as workers have them; send them to ``address`` where none has."""
        shared = self._shared.get(id(stats))
        if shared is None:
            shared = self._shared[id(stats)] = _Shared(stats, self._scatter(stats, address))
        elif shared.data.status != "finished":
            shared.data = self._scatter(stats, address)
        return shared


class Sent:
    """A layer that is with a worker."""

    def __init__(self, cluster: Cluster, name: str, stages: Sequence[LayerStage], problem: LayerProblem) -> None:
        self._cluster, self._name, self._stages, self._problem = cluster, name, stages, problem
        self._address, self._future = cluster.submit(stages, problem)

    def result(self) -> LayerSolution:
        """Wait for the solution.

        Raises:
            MagrError: As the stages do; or workers die of the layer, or are gone.
        """
        for _ in range(MOST_SENT):
            try:
                arrays = self._arrays()
            except CancelledError:
                self._cluster.solved(self._address, self._problem)
                self._address, self._future = self._cluster.submit(self._stages, self._problem)
                continue
            self._cluster.solved(self._address, self._problem)
            return from_arrays(arrays, *self._problem.weight.shape)
        raise self._deadly()

    def _arrays(self) -> Arrays:
        from distributed import KilledWorker

        while True:
            try:
                result: Arrays = self._future.result(timeout=5.0)
                return result
            except TimeoutError:
                self._cluster.emptiest()  # which says so where nobody is left
            except KilledWorker as error:
                raise self._deadly() from error
            except ImportError as error:  # in a worker that came later
                raise MagrError(f"{self._name}: a worker cannot use onnx-magr ({error}). {_REMEDY}") from error

    def _deadly(self) -> MagrError:
        return MagrError(
            f"{self._name}: workers died whenever they had this layer, most likely for want of memory; give them more, or run fewer on a "
            f"machine{_RESUME}"
        )


def _solve(
    stages: Sequence[LayerStage], helpers: Sequence[str], wanted: Mapping[str, str], problem: LayerProblem, stats: LayerStats
) -> Arrays:
    """Solve a layer in a worker that has the ``wanted`` versions, with the help of others.

    Raises:
        MagrError: It has other versions: a worker that came when the run had begun. Or as the stages do.
    """
    threads.one_blas_thread()
    if text := _differences(wanted, _facts()):
        raise MagrError(f"a worker at {platform.node()} has {text}. {_REMEDY}")
    with threads.helped(Helpers(helpers)) if helpers else contextlib.nullcontext():
        return to_arrays(run_stages(stages, replace(problem, stats=stats)))


_PROCESSOR = "processor"
_REMEDY = "Install the same versions there, and start it again"


@functools.cache
def _facts() -> Mapping[str, str]:
    """Return what solutions depend on where they are computed: versions, and what the processor decides."""
    facts = {"Python": ".".join(platform.python_version_tuple()[:2]), "distributed": version("distributed")}
    facts |= {name: text for name, text in versions().items() if name in ("onnx-magr", "numpy", "numba")}
    libraries = [library for library in ThreadpoolController().info() if library["user_api"] == "blas"]
    of_numpy = [library for library in libraries if "numpy" in library["filepath"]] or libraries[:1]
    blas = [f"{library['internal_api']} for {library.get('architecture', 'any')}" for library in of_numpy]
    return {**facts, _PROCESSOR: ", ".join([platform.machine(), *compiled.processor(), *blas])}


def _differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Name the versions that differ; empty where none do."""
    names = [name for name in {**here, **there} if name != _PROCESSOR and here.get(name) != there.get(name)]
    return ", ".join(f"{name} {there.get(name, 'none')} instead of {here.get(name, 'none')}" for name in names)


def _check(client: Any, here: Mapping[str, str]) -> list[str]:
    """Compare workers with this process; return a note where their processors may round sums in another way.

    Raises:
        MagrError: Workers lack the package, or versions differ.
    """
    problems, others = dict[str, list[str]](), list[str]()
    for address, there in sorted(client.run(_facts, on_error="return").items()):
        if isinstance(there, BaseException):
            problems.setdefault(f"cannot use onnx-magr {here['onnx-magr']} ({there})", []).append(address)
        elif text := _differences(here, there):
            problems.setdefault(f"has {text}", []).append(address)
        elif there[_PROCESSOR] != here[_PROCESSOR]:
            others.append(f"{address} ({there[_PROCESSOR]})")
    if problems:
        texts = "; ".join(f"{listed(addresses)} {problem}" for problem, addresses in problems.items())
        raise MagrError(f"workers and this process need the same packages: {texts}. {_REMEDY}")
    if not others:
        return []
    text = f"workers have other processors than this one ({here[_PROCESSOR]}): {listed(others)}"
    return [f"{text}; these may round sums in another way, so that another run need not write the same bytes"]
