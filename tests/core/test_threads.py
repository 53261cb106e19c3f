"""Work shared by threads: order, nesting, errors; the same bytes for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from magr_onnx.core import threads
from magr_onnx.core.moments import MomentAccumulator

ROOT = Path(__file__).parents[2]
SOLVE = """
import hashlib, numpy as np
from magr_onnx.core import magr, threads
from magr_onnx.core.moments import MomentAccumulator, split_stats
from magr_onnx.core.quantizers import QUANTIZERS, cross_validation
from magr_onnx.core.quantizers.interface import Options, Problem
from magr_onnx.core.types import WeightSpec
rng = np.random.default_rng(0)
parts = [MomentAccumulator(520) for _ in range(2)]
for part in parts:
    part.add_rows(*[rng.standard_normal((700, 520)).astype(np.float32)] * 2)
with threads.single_threaded_blas():
    stats = split_stats(parts, 1, None)
    weights = rng.standard_normal((520, 2100)).astype(np.float32)
    problem = Problem(weights, weights, stats, False, WeightSpec(3, 40, False))
    result = cross_validation.run(QUANTIZERS["auto"], problem, Options()).weight
    print(threads.count(), hashlib.sha256(result.dequantize().tobytes() + stats.gram.tobytes()).hexdigest())
"""


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use four threads, on any machine."""
    threads._pool.cache_clear()
    monkeypatch.setattr(threads, "count", lambda: 4)
    yield
    threads._pool.cache_clear()


def test_results_are_in_order_and_threads_share_the_work(four: None) -> None:
    together = threading.Barrier(4, timeout=60)

    def work(item: int) -> tuple[int, int]:
        if item < 4:  # four threads at once, or none of them goes on
            together.wait()
        return item * item, threading.get_ident()

    results = threads.each(work, range(20))
    assert [square for square, _ in results] == [i * i for i in range(20)]
    assert len({thread for _, thread in results}) == 4
    assert threads.each(work, []) == []


def test_work_may_be_shared_within_shared_work(four: None) -> None:
    def row(i: int) -> list[int]:
        return threads.each(lambda j: 10 * i + j, range(10))

    assert threads.each(row, range(10)) == [list(range(10 * i, 10 * i + 10)) for i in range(10)]


@pytest.mark.parametrize("bad", [0, 7, 99])
def test_an_error_ends_the_work_and_is_raised(four: None, bad: int) -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == bad:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match=f"item {bad}"):
        threads.each(work, range(100_000))
    assert len(begun) < 100_000
    assert threads.each(abs, [-1, -2, -3]) == [1, 2, 3]


def test_products_run_in_one_thread_and_then_as_before() -> None:
    def counts() -> list[int]:
        return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]

    before = counts()
    assert before
    with threads.single_threaded_blas():
        assert set(counts()) == {1}
    assert counts() == before


@pytest.mark.parametrize("shape", [(3, 4, 5), (40, 700, 2900), (128, 600, 1024), (2900, 700, 40)])
def test_a_product_that_threads_share_is_that_product(four: None, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    rng = np.random.default_rng(2)
    a, b, out = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32), np.empty((m + 1, n), np.float32)
    expected = a.astype(np.float64) @ b
    np.testing.assert_allclose(threads.product(a, b), expected, rtol=1e-4, atol=1e-4)
    assert np.shares_memory(threads.product(a, b, out[:m]), out)
    np.testing.assert_allclose(out[:m], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [40, 1300])
def test_second_moments_in_strips_are_those_of_all_rows(four: None, width: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 30, width)).astype(np.float32)
    sums = MomentAccumulator(width, float_mean=True, paired=True)
    for x, y in ((a[:10], b[:10]), (a[10:], b[10:])):
        sums.add_rows(x, y)
    sums.add_rows(a, b, weight=0.5)
    for found, (left, right) in ((sums.gram, (a, a)), (sums.cross, (a, b)), (sums.float_gram, (b, b))):
        np.testing.assert_allclose(found, 1.5 * (left.T.astype(np.float64) @ right), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sums.gram, sums.gram.T)


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    """In processes of their own: one thread, and three that switch often."""
    results = []
    for count in (1, 3):
        setting = f"import sys; sys.setswitchinterval(1e-5)\nfrom magr_onnx.core import threads\nthreads.count = lambda: {count}\n"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"}
        run = subprocess.run([sys.executable, "-c", setting + SOLVE], capture_output=True, text=True, env=environment, check=True)
        results.append(run.stdout.split())
    assert [int(threads_used) for threads_used, _ in results] == [1, 3]
    assert results[0][1] == results[1][1]


RUN = """
import os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
import magr_onnx
from magr_onnx.core import threads
from magr_onnx.models import bundled
if sys.argv[1] != "1":
    threads.count = lambda: int(sys.argv[1])
data = {"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:20]}
options = {"output": sys.argv[2], "effort": sys.argv[3], "include": ["node_MatMul_[78]*"], "accuracy_level": 0}
magr_onnx.optimize(bundled.MODEL, data, progress=False, **options)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be held to one core here")
@pytest.mark.parametrize("effort", ["fast", pytest.param("best", marks=pytest.mark.slow)])
def test_any_number_of_cores_gives_the_same_file(effort: str, tmp_path: Path) -> None:
    """On one core, and with three threads on all of them; onnxruntime uses those as well."""
    files = [tmp_path / f"{count}.onnx" for count in (1, 3)]
    for file in files:
        subprocess.run([sys.executable, "-c", RUN, file.stem, str(file), effort], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
