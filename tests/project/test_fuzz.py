"""Random graphs, damaged files and onnx's backend tests through `optimize`: converted and right, or refused with a reason; never a bug."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st

from tests.fuzz import backend, isolated, mutate, random_graphs
from tests.fuzz.generate import Made, make
from tests.fuzz.judge import CONVERTED, OPTIONS, Outcome
from tests.fuzz.random_graphs import RUNS, judge_made, judge_odd, problem

SEED = int(os.environ.get("ONNX_MAGR_FUZZ_SEED", "0"))


def verdict(made: Made, run: str) -> str | None:
    """What is wrong with what became of a random graph."""
    wrong = problem(made, judge_made(made, run))
    return None if wrong is None else f"{run}: {wrong}"


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.randoms(use_true_random=False), st.sampled_from(sorted(RUNS)))
def test_random_graphs(rng: random.Random, run: str) -> None:
    made = make(rng)
    target(float(made.linear))
    assert verdict(made, run) is None


FOUND = (1531, 1107, 1715, 3028, 3435, 3527, 3535, 345, 165, 4443, 4086, 6213, 6341, 6581, 6637)
"""Seeds whose graphs once failed: overridable weights and dead subgraphs between stages, inputs that never change, Gemm below opset 11."""


@pytest.mark.parametrize("seed", FOUND)
@pytest.mark.parametrize("run", ["matmulnbits, calibrated", "dynamic-int8, calibrated"])
def test_graphs_that_failed_once(seed: int, run: str) -> None:
    assert verdict(make(random.Random(seed)), run) is None


@pytest.mark.long
def test_random_graphs_are_mostly_converted() -> None:
    kinds = Counter(judge_made(make(random.Random(seed)), "qdq, data-free").kind for seed in range(40))
    assert kinds[CONVERTED] > 25, kinds


def bugs(found: Sequence[tuple[int, Outcome]]) -> str:
    return "\n".join(f"seed {seed}: {outcome.kind}: {outcome.detail[:300]}" for seed, outcome in found if outcome.bug)


ODD_FOUND = (300680,)
"""Seeds whose graphs of odd forms once failed: an output without a type that is an input."""


@pytest.mark.long
def test_graphs_of_odd_forms() -> None:
    assert not bugs([(seed, judge_odd(seed)) for seed in (*ODD_FOUND, *range(40))])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("odd", [False, True])
def test_many_random_graphs(odd: bool) -> None:
    found = random_graphs.campaign(2000, SEED, odd)
    print(f"seeds from {SEED}\n{isolated.table([outcome for _, outcome in found])}")
    assert not bugs(found)


@pytest.mark.long
def test_damaged_files() -> None:
    found = mutate.campaign(300, SEED)
    print(f"seeds from {SEED}\n{isolated.table([outcome for _, outcome in found])}")
    assert not bugs(found)
    assert len({outcome.kind for _, outcome in found}) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files() -> None:
    found = mutate.campaign(10_000, SEED)
    print(f"seeds from {SEED}\n{isolated.table([outcome for _, outcome in found])}")
    assert not bugs(found)


@pytest.mark.long
def test_a_sample_of_the_backend_tests() -> None:
    formats = list(OPTIONS)
    cases = backend.all_cases(formats)
    assert backend.report(cases, formats, range(0, len(cases), 61)) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_backend_tests() -> None:
    formats = list(OPTIONS)
    cases = backend.all_cases(formats)
    assert backend.report(cases, formats, range(len(cases))) == 0


def test_a_worker_that_dies_is_an_outcome() -> None:
    module = "tests.fuzz.dying"
    found = dict(isolated.outcomes(module, [], range(4), seconds=12))
    assert [found[i].kind for i in range(4)] == [CONVERTED, "crash", "timeout", CONVERTED]
    assert found[1].detail == "at float: SIGSEGV"
    assert found[2].detail == "at optimize"


def test_a_worker_that_does_not_start_is_no_outcome() -> None:
    with pytest.raises(RuntimeError, match="does not start"):
        list(isolated.outcomes("tests.fuzz.no_such_module", [], range(4)))
