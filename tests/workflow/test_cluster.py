"""Layers solved by workers of dask: the same file as alone, whoever dies, and errors before the long work."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import magr_onnx
from magr_onnx.core import compiled
from magr_onnx.core.gram import LEAST_WIDTH
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import DependencyError, MagrError, OptionError
from magr_onnx.models import bundled
from magr_onnx.passes import MagR
from magr_onnx.workflow import cluster
from tests import graphs
from tests.helpers import PATIENCE
from tests.workflow.test_checkpoint import SETTINGS, chain_file, deep_file, layer_files, plain_row, written

pytest.importorskip("distributed")
WORKER = [sys.executable, "-m", "distributed.cli.dask_worker"]
OPTIONS = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a scheduler with two workers on this machine."""
    with cluster._processes(2) as address:
        yield address


def children() -> set[int]:
    """The processes of workers below this one."""
    psutil, found = pytest.importorskip("psutil"), set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("spawn_main" in argument for argument in process.cmdline()):
                found.add(process.pid)
    return found


class Killer:
    """A progress callback that has one worker killed, so many seconds after the first layer is begun; none that there were before."""

    def __init__(self, seconds: float, which: random.Random) -> None:
        self.killed, self._others = 0, children()
        self._seconds, self._which, self._begun = seconds, which, threading.Event()
        threading.Thread(target=self._kill, daemon=True).start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "quantizing":
            self._begun.set()

    def _kill(self) -> None:
        self._begun.wait()
        time.sleep(self._seconds)
        if workers := children() - self._others:
            os.kill(self._which.choice(sorted(workers)), signal.SIGKILL)
            self.killed += 1


FIRST = ("feedback", "low-rank", "int8", "mixed", "in stages", "data-free")


@pytest.mark.long
@pytest.mark.parametrize("names", [FIRST, pytest.param([name for name in SETTINGS if name not in FIRST], marks=pytest.mark.slow)])
def test_workers_make_the_same_file_and_the_same_report(names: Sequence[str], scheduler: str, tmp_path: Path) -> None:
    data = [graphs.feeds(graphs.chain(), seed=i) for i in range(8)]
    deep = [graphs.feeds(graphs.deep(), 64, seed=i) for i in range(4)]
    cases = [(name, chain_file(tmp_path), None if name == "data-free" else data) for name in names]
    for name, model, samples in [*cases, (names[0], deep_file(tmp_path), deep)]:
        files, rows = [], []
        for workers in (None, scheduler):
            folder = tmp_path / f"{name} {model.stem} {workers is None}"
            folder.mkdir()
            output = folder / "out.onnx"
            _, report = magr_onnx.optimize(model, samples, output=output, workers=workers, progress=False, **SETTINGS[name])
            files.append(written(output))
            rows.append([plain_row(row) for row in report.layers])
            assert not any("processor" in note for note in report.notes)
        assert files[0] == files[1], name
        assert rows[0] == rows[1], name


@pytest.mark.long
def test_a_job_begun_alone_is_finished_by_workers(scheduler: str, tmp_path: Path) -> None:
    model, samples, job = deep_file(tmp_path), [graphs.feeds(graphs.deep(), 64, seed=i) for i in range(4)], tmp_path / "job"
    plain, resumed = tmp_path / "plain.onnx", tmp_path / "resumed.onnx"
    magr_onnx.optimize(model, samples, output=plain, resume=job, progress=False)
    whole = layer_files(job)
    for path in whole[::2]:
        path.unlink()
    _, report = magr_onnx.optimize(model, samples, output=resumed, resume=job, workers=scheduler, progress=False)
    assert plain.read_bytes() == resumed.read_bytes()
    assert layer_files(job) == whole
    assert any("5 layers were finished before" in note for note in report.notes)


@pytest.mark.long
def test_own_workers_that_are_killed_in_turn_make_the_same_file(tmp_path: Path) -> None:
    model, samples, before = deep_file(tmp_path), [graphs.feeds(graphs.deep(), 64, seed=i) for i in range(4)], children()
    alone, path, killed = tmp_path / "alone.onnx", tmp_path / "killed.onnx", list[int]()

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done in (1, 4):
            killed.append(max(children() - before))
            os.kill(killed[-1], signal.SIGKILL)

    magr_onnx.optimize(model, samples, output=alone, effort="fast", progress=False)
    magr_onnx.optimize(model, samples, output=path, effort="fast", workers=2, progress=kill)
    assert len(set(killed)) == 2
    assert path.read_bytes() == alone.read_bytes()
    assert children() == before


def bundled_model(path: Path, workers: int | None, killer: Killer | bool, effort: str) -> None:
    """Quantize the bundled model."""
    data = {"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:20]}
    magr_onnx.optimize(bundled.MODEL, data, output=path, workers=workers, progress=killer, accuracy_level=0, effort=effort)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_workers_killed_at_random_moments(effort: str, workers: int, tmp_path: Path) -> None:
    alone, path, which = tmp_path / "alone.onnx", tmp_path / "killed.onnx", random.Random(workers)
    bundled_model(alone, None, False, effort)
    begin = time.perf_counter()
    bundled_model(path, workers, False, effort)
    length, killed = (time.perf_counter() - begin) / 2, 0
    while killed < 10:
        killer = Killer(which.uniform(0, length), which)
        bundled_model(path, workers, killer, effort)
        killed += killer.killed
        assert path.read_bytes() == alone.read_bytes()


@pytest.mark.skipif(not compiled.available(), reason="blocks of channels are shared where loops are compiled")
def test_a_layer_of_many_channels_is_that_of_a_run_alone(scheduler: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 64))
    stats = LayerStats(x.T @ x / 400, x.mean(0), 400)
    problem = LayerProblem(rng.standard_normal((64, 2100)).astype(np.float32), None, stats)
    plan = magr_onnx.build_pipeline(quantizer="comq", alpha=1e-3, bits=3)
    with cluster.cluster(scheduler) as workers:
        sent = workers.send("layer", plan.solving, problem).result()
    here = plan.solve(problem)
    assert sent.quantized is not None
    assert here.quantized is not None
    np.testing.assert_array_equal(sent.quantized.codes, here.quantized.codes)
    np.testing.assert_array_equal(sent.quantized.scales, here.quantized.scales)


@pytest.mark.long
@pytest.mark.parametrize("dies", [False, True])
def test_workers_help_with_the_output_channels_of_a_layer(dies: bool, scheduler: str) -> None:
    """Items in order, by two processes; those of a helper that dies are done all the same."""
    from distributed import Client

    def task(helper: str) -> list[tuple[int, int]]:
        import os
        import time

        from magr_onnx.workflow.helpers import Helpers

        leader = os.getpid()

        def function(item: int) -> tuple[int, int]:
            time.sleep(0.1)
            if dies and os.getpid() != leader:
                os._exit(1)
            return item * item, os.getpid()

        return Helpers([helper])(function, range(12))

    with Client(scheduler) as client:
        client.wait_for_workers(2)
        first, second = client.nthreads()
        results = client.submit(task, second, workers=[first], pure=False).result(timeout=PATIENCE)
    assert [square for square, _ in results] == [item * item for item in range(12)]
    assert len({process for _, process in results}) == (1 if dies else 2)


def test_an_error_of_a_layer_is_that_of_a_run_alone(scheduler: str) -> None:
    problem = LayerProblem(np.ones((4, 4), np.float32), None, LayerStats(np.eye(4), np.zeros(4), 8))
    with cluster.cluster(scheduler) as workers, pytest.raises(OptionError, match=r"alpha=-1.0 must be 0 or more"):
        workers.send("layer", [MagR(-1.0)], problem).result()


def test_a_worker_of_other_versions_that_comes_later_solves_nothing(scheduler: str) -> None:
    problem = LayerProblem(np.ones((4, 4), np.float32), None, LayerStats(np.eye(4), np.zeros(4), 8))
    with cluster.cluster(scheduler) as workers:
        workers._here = {**workers._here, "numpy": "1.0"}
        with pytest.raises(MagrError, match=r"a worker at \S+ has numpy \S+ instead of 1.0. Install the same versions there"):
            workers.send("layer", [MagR(1.0)], problem).result()


def test_a_scheduler_that_is_gone_ends_the_run(scheduler: str) -> None:
    """The client closes by itself when it could not connect again; here it is closed by hand."""
    problem = LayerProblem(np.ones((4, 4), np.float32), None, LayerStats(np.eye(4), np.zeros(4), 8))
    with cluster.cluster(scheduler) as workers:
        workers._client.close()
        with pytest.raises(MagrError, match="or their scheduler is; start them, and run this again"):
            workers.send("layer", [MagR(1.0)], problem)


class Untouched:
    """Calibration data that is not to be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the data was read before the workers were checked")


def refused(workers: Any, error: type[MagrError], message: str) -> None:
    with pytest.raises(error, match=message):
        magr_onnx.optimize(graphs.chain(), Untouched(), workers=workers, progress=False)


def test_what_is_wrong_with_workers_is_said_before_the_long_work(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("many", 0, -1, "localhost:8786"):
        refused(value, OptionError, "give a number of processes, or the address of a scheduler")
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "CONNECT", 0.5)
        refused("tcp://127.0.0.1:1", MagrError, "no scheduler of dask answers at tcp://127.0.0.1:1 .*start one there")
        refused("carrier://pigeon:1", MagrError, "no scheduler of dask answers at carrier://pigeon:1 .*unknown address scheme")
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "versions", lambda: {"onnx-magr": "0.0.1", "numpy": np.__version__})
        cluster._facts.cache_clear()
        refused(scheduler, MagrError, r"need the same packages: tcp://\S+, tcp://\S+ has onnx-magr .* instead of 0.0.1.*Install the same")
    cluster._facts.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "distributed", None)
        refused(2, DependencyError, r"needs? dask.distributed, which is not installed; pip install 'onnx-magr\[distributed\]'")
    with monkeypatch.context() as patch:
        patch.setattr(cluster.sys, "executable", "/bin/false")
        refused(2, MagrError, "2 workers did not start")


@pytest.mark.long
def test_workers_that_lack_the_package_or_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    lacking = "import sys; sys.modules['magr_onnx'] = None; from distributed.cli.dask_worker import main; main()"
    with LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50) as empty:
        address = empty.scheduler_address
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "CONNECT", 1.0)
            refused(address, MagrError, f"the scheduler at {address} has no workers; start some .dask worker {address}")
        with running([sys.executable, "-c", lacking, address, *OPTIONS]):
            monkeypatch.setattr(cluster, "CONNECT", 60.0)
            refused(address, MagrError, r"tcp://\S+ cannot use onnx-magr .*magr_onnx.*Install the same versions there")
        monkeypatch.setattr(cluster, "GONE", 1.0)
        plan = magr_onnx.build_pipeline(quantizer="rtn")
        problem = LayerProblem(np.ones((32, 8), np.float32), None, LayerStats.data_free(32))
        with running([*WORKER, address, *OPTIONS]) as worker, cluster.cluster(address) as workers:
            worker.kill()
            worker.wait()
            with pytest.raises(MagrError, match="all workers have been gone for 1 s, or their scheduler is; start them"):
                workers.send("layer", plan.solving, problem).result()


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, until the block ends."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("k", [5, LEAST_WIDTH])
def test_statistics_travel_as_they_are(k: int) -> None:
    """Those of no data with the same strides too, since products of views may round in another way."""
    rng = np.random.default_rng(0)
    fold = LayerStats(np.eye(k), rng.standard_normal(k), 3)
    measured = LayerStats(2 * np.eye(k), rng.standard_normal(k), 7, folds=(fold,))
    measured.memo("heavy", lambda: threading.Lock())
    for stats in (measured, LayerStats.data_free(k), LayerStats.data_free(k, taps=k)):
        copy = pickle.loads(pickle.dumps(stats))
        assert (copy.rows, copy.common_mean, copy.taps, len(copy.folds)) == (stats.rows, stats.common_mean, stats.taps, len(stats.folds))
        assert isinstance(copy.gram, type(stats.gram))
        if isinstance(stats.gram, np.ndarray):
            np.testing.assert_array_equal(copy.gram, stats.gram)
            assert copy.gram.strides == stats.gram.strides
        np.testing.assert_array_equal(copy.mean, stats.mean)
        np.testing.assert_array_equal(copy.gram.diagonal(), stats.gram.diagonal())
        np.testing.assert_array_equal(copy.regularized(False) @ np.ones(k), stats.regularized(False) @ np.ones(k))
