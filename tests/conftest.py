"""What every test runs under: one thread for each BLAS, a worker for each processor in runs of everything, and the quick cases."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before NumPy is imported
    os.environ.setdefault(_name, "1")  # workers of several threads each would only wait for one another

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # however busy it is
settings.load_profile("any machine")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each processor where all tests are asked for; none for tests that are named, which would wait for workers to start."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the first case of every test that is neither slow nor long as quick."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in seen and not any(item.get_closest_marker(name) for name in ("slow", "long")):
            item.add_marker("quick")
            seen.add(test)
